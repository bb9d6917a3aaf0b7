"""Tuned weights alone: a safetensors file, and a small JSON that says what they belong to."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tav_model.errors import TavError
from tav_model.files import read_json, write_json
from tav_model.tensors import load_tensors, save_tensors

if TYPE_CHECKING:
    from diffusers import ModelMixin

TRAINABLE_MODULES = ("attn1.to_q", "attn2.to_q", "attn_temp")
"""The projections that Tune-A-Video trains: the queries of both attentions, and the temporal attention whole."""

WEIGHTS_FILE = "tuned.safetensors"
INFO_FILE = "tuned.json"


def save(unet: ModelMixin, folder: str | Path, modules: tuple[str, ...], information: dict[str, Any]) -> None:
    """Write `tuned.safetensors` (every parameter that `modules` select, `norm_temp` where `attn_temp` is) and `tuned.json`.

    Args:
        information: what else the JSON says: base model, steps, digest of the clip.
    """
    folder = Path(folder)
    weights = {name: value.detach().cpu() for name, value in _saved_tensors(unet, modules).items()}
    info = {
        "trainable_modules": list(modules),
        "attention": {"spatial": list(unet.config.attention), "temporal": unet.config.temporal},
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        **information,
    }
    save_tensors(folder / WEIGHTS_FILE, weights, {"stage": "tune", "format": "pt"})
    info["sha256"] = _sha256(folder / WEIGHTS_FILE)
    write_json(folder / INFO_FILE, info)


def load(unet: ModelMixin, folder: str | Path) -> dict[str, Any]:
    """Read tuned weights into `unet`, in its own dtype and device; nothing changes unless everything fits.

    Returns:
        What `tuned.json` says.

    Raises:
        TavError: files missing or damaged, other weights than the JSON tells of, another attention configuration,
            names or shapes that are not this model's, values that are not finite.
    """
    folder = Path(folder)
    info = read_info(folder)
    here = {"spatial": list(unet.config.attention), "temporal": unet.config.temporal}
    if info["attention"] != here:
        raise TavError(f"{folder}: tuned with attention {info['attention']}, but the model has {here}")
    path = folder / WEIGHTS_FILE
    weights, _ = load_tensors(path)
    if _sha256(path) != info["sha256"]:
        raise TavError(f"{path}: not the weights that {INFO_FILE} beside it tells of (its sha256 differs)")
    own = _saved_tensors(unet, tuple(info["trainable_modules"]))
    if odd := sorted(own.keys() ^ weights.keys()):
        raise TavError(f"{path}: not tuned from this model: {odd[0]} is in only one of them")
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise TavError(
                f"{path}: not tuned from this model: {name} is {tuple(tensor.shape)} in the file, "
                f"{tuple(own[name].shape)} in the model"
            )
        if not torch.isfinite(tensor).all():
            raise TavError(f"{path}: {name} has values that are not finite")
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)
    return info


def read_info(folder: str | Path) -> dict[str, Any]:
    """What `tuned.json` in `folder` says. Raises TavError where it is missing or damaged."""
    path = Path(folder) / INFO_FILE
    info = read_json(path)
    needed = {"attention", "trainable_modules", "sha256"}
    if not isinstance(info, dict) or needed - info.keys():
        raise TavError(f"{path}: not the description of tuned weights ({', '.join(sorted(needed))} are needed)")
    modules = info["trainable_modules"]
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        raise TavError(f"{path}: trainable_modules: {modules!r} must be a list of names")
    return info


def _saved_tensors(unet: ModelMixin, modules: tuple[str, ...]) -> dict[str, torch.nn.Parameter]:
    """The trained parameters, and the norms before `attn_temp`.

    Inflation makes those norms, so no base model has them. They are not trained, but a model whose own were changed
    (imported from another Tune-A-Video code, say) must find them again.
    """
    saved = unet.trainable_parameters(modules)
    if any("attn_temp" in name for name in saved):
        saved |= {name: value for name, value in unet.named_parameters() if ".norm_temp." in name}
    return saved


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
