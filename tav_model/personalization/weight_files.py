"""Files of weights from the web: safetensors alone are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tav_model.errors import TavError
from tav_model.tensors import load_tensors

if TYPE_CHECKING:
    import torch

PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
UNET_NAMES = "model.diffusion_model."
"""The beginning of names of the UNet in a checkpoint of the original code."""
SDXL = "of Stable Diffusion XL; only Stable Diffusion 1 and 2 can be inflated to video"


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors in a safetensors file by name, and its metadata.

    Raises:
        TavError: the file is a pickle, which can run code when it is read; or it is missing, damaged or empty, or has
            values that are not finite.
    """
    import torch

    if path.suffix.lower() in PICKLES:
        raise TavError(
            f"{path}: {path.suffix} files may run code when they are read; only .safetensors are allowed: "
            "download that version, or convert it (docs/how-to/personalised-models.md)"
        )
    tensors, metadata = load_tensors(path)
    if not tensors:
        raise TavError(f"{path}: has no tensors")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise TavError(f"{path}: {name} has values that are not finite")
    return tensors, metadata
