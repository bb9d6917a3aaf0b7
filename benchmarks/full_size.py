"""A base model of Stable Diffusion 1.5's size with random weights, to measure what its stages need."""

from __future__ import annotations

from pathlib import Path

from benchmarks.speed import TEXT_SHAPES, UNET_CONFIGS
from tav_model.files import atomic_folder

CHANNELS = (128, 256, 512, 512)  # of the VAE's levels
TEXT_LAYERS, TEXT_HEADS, TEXT_CHANNELS = 12, 12, 3072


def write_base(folder: Path) -> None:
    """Write a base model in diffusers' layout, in float16; one that is there already is kept.

    Args:
        folder: where to write it; about 2.1 GB.
    """
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from toyworld import WEIGHTS

    if folder.exists():
        return
    length, width = TEXT_SHAPES["sd15"]
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer", model_max_length=length)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=TEXT_CHANNELS,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=TEXT_HEADS,
        max_position_embeddings=length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    levels = len(CHANNELS)
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=CHANNELS,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=2,
            latent_channels=4,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(sample_size=64, **UNET_CONFIGS["sd15"]),
        scheduler=DDIMScheduler.from_pretrained(WEIGHTS / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with atomic_folder(folder) as new:
        pipeline.to(torch.float16).save_pretrained(new, safe_serialization=True)
