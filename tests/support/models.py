"""Small models of Stable Diffusion's shapes with random weights, made on the spot."""

import string
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tav_model import TuneAVideoPipeline, UNet3DConditionModel

CONTEXT_DIM = 12
# A Stable Diffusion 2 UNet differs from one of Stable Diffusion 1 in these.
SD2 = {"use_linear_projection": True, "attention_head_dim": [2, 4], "upcast_attention": True}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed))


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """`||a - b|| / ||b||`."""
    return ((ours - theirs).norm() / theirs.norm()).item()


def image_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """Two levels, the lower one without attention, as the lowest of Stable Diffusion."""
    levels = len(changes.get("block_out_channels", (8, 16)))
    config = {
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": CONTEXT_DIM,
        "attention_head_dim": 2,
        "sample_size": 8,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DConditionModel(**config | changes).eval()


def video_unet(
    seed: int = 0, attention: tuple[str, ...] = ("first", "former"), temporal: bool = True, **changes: Any
) -> UNet3DConditionModel:
    """`image_unet` inflated, its temporal attention no longer silent: as after some tuning."""
    unet = UNet3DConditionModel.from_unet2d(image_unet(seed, **changes), attention=attention, temporal=temporal)
    wake_temporal_attention(unet, seed)
    return unet


def wake_temporal_attention(unet: UNet3DConditionModel, seed: int = 0) -> None:
    """Random weights for every `attn_temp` and `norm_temp`, whose output is zero after inflation."""
    generator = seeded(seed + 1)
    for name, parameter in unet.named_parameters():
        if "attn_temp" in name or "norm_temp" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + ("norm_temp.weight" in name))


def image_vae(seed: int = 0, **changes: Any) -> AutoencoderKL:
    """A VAE of factor 2."""
    config = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (4, 8),
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 16,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoencoderKL(**config | changes).eval()


def text_encoder(seed: int = 0, max_tokens: int = 10) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=2 * 26 + 2,
        hidden_size=CONTEXT_DIM,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=max_tokens,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CLIPTextModel(config).eval()


def tokenizer(max_tokens: int | None = 10) -> CLIPTokenizer:
    """Every letter is a token; `max_tokens` None: the file does not say how many the model can take."""
    letters = [*string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
    vocabulary = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    limit = {} if max_tokens is None else {"model_max_length": max_tokens}
    return CLIPTokenizer(vocab=vocabulary, merges=[], **limit)


def scheduler(**changes: Any) -> DDIMScheduler:
    return DDIMScheduler(**SCHEDULER | changes)


def pipeline(seed: int = 0, **parts: Any) -> TuneAVideoPipeline:
    """A pipeline without a progress bar; `parts` replace its parts."""
    made = {
        "vae": image_vae(seed),
        "text_encoder": text_encoder(seed),
        "tokenizer": tokenizer(),
        "unet": video_unet(seed),
        "scheduler": scheduler(),
    }
    pipe = TuneAVideoPipeline(**made | parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion_folder(folder: Path, scheduler: Any, seed: int = 0) -> Path:
    """What `StableDiffusionPipeline.save_pretrained` leaves, with a scheduler of any class."""
    from diffusers import StableDiffusionPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It has its own opinion on schedulers, and changes their options.
        pipe = StableDiffusionPipeline(
            vae=image_vae(seed),
            text_encoder=text_encoder(seed),
            tokenizer=tokenizer(),
            unet=image_unet(seed),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.save_pretrained(folder)
    scheduler.save_pretrained(folder / "scheduler")
    return folder
