"""Encode: the VAE's posterior of the frames, and the text embeddings of the caption and of the empty prompt."""

from __future__ import annotations

from pathlib import Path

from tasks.model_loading import MODEL_LOADING
from tav.config import EncodeParams
from tav.runtime.devices import retry_with_smaller_batch
from tav.runtime.progress import Progress
from tav_model.base_models import base_digest, load_part
from tav_model.digests import digest
from tav_model.errors import TavError
from tav_model.files import atomic_folder
from tav_model.tensors import StoredTensor, read_metadata, save_tensors


def encode(
    frames: Path,
    out: Path,
    *,
    base: str,
    caption: str,
    params: EncodeParams,
    device: str,
    chunk: int,
    progress: Progress,
) -> None:
    """Write `latents.safetensors` (`mean`, `deviation`: `1 c f h w`) and `text.safetensors` (`caption`, `empty`: `1 n c`).

    The posterior is kept rather than a sample of it, so that each tuning step draws its own.

    Raises:
        TavError: the frames' size is no multiple of the VAE's factor.
    """
    import torch

    from tav_model.latents import encode_frames
    from tav_model.text import encode_prompts

    pixels, metadata = (
        StoredTensor(frames / "frames.safetensors", "frames"),
        read_metadata(frames / "frames.safetensors"),
    )
    progress.total = len(pixels)
    with MODEL_LOADING:
        vae = load_part(base, "vae", torch_dtype=getattr(torch, params.precision)).to(device)
        text_encoder, tokenizer = load_part(base, "text_encoder").to(device), load_part(base, "tokenizer")
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    _, height, width, _ = pixels.shape
    if height % factor or width % factor:
        raise TavError(f"params.yaml: decode: {width}x{height} must be multiples of {factor} for this base model's VAE")
    with progress:

        def encode_all(size: int) -> tuple[torch.Tensor, torch.Tensor]:
            progress.update(-progress.done)  # A retry starts over.
            return encode_frames(vae, pixels, size, on_chunk=progress.update)

        (mean, deviation), _ = retry_with_smaller_batch(encode_all, chunk, "frames at a time")
    embeddings = encode_prompts(tokenizer, text_encoder, [caption, ""]).cpu()
    common = {"stage": "encode", "base": base_digest(base), "frames": digest(frames / "frames.safetensors")}
    with atomic_folder(out) as folder:
        save_tensors(
            folder / "latents.safetensors",
            {"mean": mean.cpu(), "deviation": deviation.cpu()},
            common | {"shape": "b c f h w", "scale": str(vae.config.scaling_factor), "fps": metadata["fps"]},
        )
        save_tensors(
            folder / "text.safetensors",
            {"caption": embeddings[:1], "empty": embeddings[1:]},
            common | {"shape": "b n c", "text": caption},
        )
