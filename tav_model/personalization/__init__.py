"""Personalised base models: LoRA, textual inversion and single-file checkpoints, made part of an ordinary base model."""
