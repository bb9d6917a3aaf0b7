"""What a fresh clone runs on without any download: a small base model and a sample clip, both made by a command."""
