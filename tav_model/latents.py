"""Frames to latents and back: the VAE's posterior of each frame, and decoding, in chunks of frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import rearrange

from tav_model.errors import TavError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from tav_model.tensors import StoredTensor


@torch.no_grad()
def encode_frames(
    vae: AutoencoderKL,
    frames: np.ndarray | StoredTensor,
    chunk_size: int = 8,
    on_chunk: Callable[[int], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the posterior of each frame's latents, scaled to the unit variance that the UNet expects.

    Args:
        vae: the base model's.
        frames: uint8, `f h w 3`; height and width multiples of the VAE's factor. Those in a file are read chunk by chunk.
        chunk_size: frames encoded at a time, which bounds the memory.
        on_chunk: called after each chunk with its number of frames.

    Returns:
        Mean and standard deviation, each `1 c f h w` in float32; `mean + deviation * noise` is a sample.
    """
    scale = vae.config.scaling_factor
    if chunk_size < 1:
        raise ValueError(f"chunk_size: {chunk_size} must be at least 1")
    moments: list[torch.Tensor] = []
    for start in range(0, len(frames), chunk_size):
        chunk = torch.as_tensor(frames[start : start + chunk_size])
        images = rearrange(chunk.to(vae.device), "f h w c -> f c h w").to(vae.dtype) / 127.5 - 1.0
        posterior = vae.encode(images).latent_dist
        parts = [rearrange(x, "f c h w -> 1 c f h w").float() * scale for x in (posterior.mean, posterior.std)]
        if not all(part.isfinite().all() for part in parts):
            raise TavError(f"the VAE's latents are not finite in {vae.dtype}: encode in float32")
        if not moments:  # Those of a long clip exist once: parts that are joined at the end would exist twice.
            _, c, _, h, w = parts[0].shape
            moments = [part.new_empty(1, c, len(frames), h, w) for part in parts]
        for whole, part in zip(moments, parts, strict=True):
            whole[:, :, start : start + len(chunk)] = part
        if on_chunk is not None:
            on_chunk(len(chunk))
    mean, deviation = moments
    return mean, deviation


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: torch.Tensor, chunk_size: int = 8) -> torch.Tensor:
    """Decode latents `b c f h w` to frames `b 3 f H W` in [0, 1], float32, on the CPU, `chunk_size` frames at a time.

    A VAE in float16 is cast to float32 first, because Stable Diffusion's overflows in float16 and returns black frames.

    Raises:
        TavError: the frames are not finite.
    """
    if vae.dtype == torch.float16:
        vae.to(torch.float32)
    if chunk_size < 1:
        raise ValueError(f"chunk_size: {chunk_size} must be at least 1")
    b = latents.shape[0]
    images = []
    for chunk in rearrange(latents, "b c f h w -> (b f) c h w").split(chunk_size):
        image = vae.decode(chunk.to(vae.dtype) / vae.config.scaling_factor).sample
        if not torch.isfinite(image).all():
            raise TavError(
                "the edited video is not finite: use float32, or fewer steps of tuning at a lower learning rate"
            )
        images.append((image.float().cpu() / 2 + 0.5).clamp(0, 1))
    return rearrange(torch.cat(images), "(b f) c h w -> b c f h w", b=b)


def to_frames(video: torch.Tensor) -> np.ndarray:
    """Convert one video `3 f H W` in [0, 1] to uint8 frames `f H W 3`."""
    return rearrange((video * 255).round().to(torch.uint8), "c f h w -> f h w c").numpy()
