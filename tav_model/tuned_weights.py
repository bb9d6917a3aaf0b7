"""The trained part of a video UNet: which parameters it is, and files of those parameters alone.

They are saved as `tuned.safetensors`, and `tuned.json` records which model and which clip they belong to.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tav_model.digests import file_sha256
from tav_model.errors import TavError
from tav_model.files import read_json, write_json
from tav_model.low_rank import fuse_low_rank, low_rank_parameters, rank_of, update_shapes
from tav_model.tensors import load_tensors, save_tensors

if TYPE_CHECKING:
    from diffusers import ModelMixin

TRAINABLE_MODULES = ("attn1.to_q", "attn2.to_q", "attn_temp")
"""The modules that Tune-A-Video trains: the queries of both attentions, and the complete temporal attention."""

WEIGHTS_FILE = "tuned.safetensors"
INFO_FILE = "tuned.json"


def trainable_parameters(unet: ModelMixin, modules: Iterable[str] = TRAINABLE_MODULES) -> dict[str, torch.nn.Parameter]:
    """Return the parameters of every module whose dotted name ends with one of `modules`, by state-dict name.

    `attn_temp` selects nothing where the UNet's `temporal` is off.

    Raises:
        TavError: a name that fits no module.
    """
    patterns = tuple(modules)
    selected = set()
    matched = set()
    for name, module in unet.named_modules():
        for pattern in patterns:
            if f".{name}".endswith(f".{pattern}"):
                matched.add(pattern)
                if unet.config.temporal or ".attn_temp" not in f".{name}":
                    selected |= {f"{name}.{key}" for key, _ in module.named_parameters()}
    unmatched = [pattern for pattern in patterns if pattern not in matched or not pattern]
    if unmatched or not selected:
        raise TavError(f"trainable: {', '.join(map(repr, unmatched)) or patterns} selects no parameter of this model")
    # In the order of the state dict, whatever the order of the patterns.
    return {name: value for name, value in unet.named_parameters() if name in selected}


def save_tuned(unet: ModelMixin, folder: str | Path, modules: Iterable[str], information: dict[str, Any]) -> None:
    """Write the trained parameters, and the norms before `attn_temp`, with a description.

    Of a model that is tuned by low-rank updates (`tav_model.low_rank`), it is these updates alone.

    Args:
        unet: the tuned model.
        folder: gets the files `tuned.safetensors` and `tuned.json`.
        modules: see `trainable_parameters`.
        information: further entries of the description: base model, steps, digest of the clip.
    """
    folder, modules = Path(folder), tuple(modules)
    updates = low_rank_parameters(unet)
    saved = updates or _saved_parameters(unet, modules)
    if updates:
        information = {"lora_rank": rank_of(updates), **information}
    weights = {name: value.detach().cpu() for name, value in saved.items()}
    info = {
        "trainable_modules": list(modules),
        "attention": _attention(unet),
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        **information,
    }
    save_tensors(folder / WEIGHTS_FILE, weights, {"stage": "tune", "format": "pt"})
    info["sha256"] = file_sha256(folder / WEIGHTS_FILE).hexdigest()
    write_json(folder / INFO_FILE, info)


def load_tuned(unet: ModelMixin, folder: str | Path) -> dict[str, Any]:
    """Read tuned weights into `unet`, in its own dtype and on its device. Nothing changes unless everything fits.

    Low-rank updates are added to the weights, which must be those of the inflated base model.

    Returns:
        The contents of `tuned.json`.

    Raises:
        TavError: files are missing, damaged or do not belong together; the attention configuration, a name or a shape
            is not this model's; a value is not finite.
    """
    folder = Path(folder)
    info = read_info(folder)
    if info["attention"] != _attention(unet):
        raise TavError(f"{folder}: tuned with attention {info['attention']}, but the model has {_attention(unet)}")
    path = folder / WEIGHTS_FILE
    weights, _ = load_tensors(path)
    if file_sha256(path).hexdigest() != info["sha256"]:
        raise TavError(f"{path}: not the weights that {INFO_FILE} describes (its sha256 differs)")
    modules, rank = tuple(info["trainable_modules"]), info.get("lora_rank")
    own = {} if rank else _saved_parameters(unet, modules)
    trained = trainable_parameters(unet, modules)
    shapes = update_shapes(unet, trained, rank) if rank else {name: tuple(value.shape) for name, value in own.items()}
    if unmatched := sorted(shapes.keys() ^ weights.keys()):
        raise TavError(f"{path}: not tuned from this model: {unmatched[0]} is in only one of them")
    for name, tensor in weights.items():
        if tuple(tensor.shape) != shapes[name]:
            raise TavError(
                f"{path}: not tuned from this model: {name} is {tuple(tensor.shape)} in the file, "
                f"{shapes[name]} in the model"
            )
        if not torch.isfinite(tensor).all():
            raise TavError(f"{path}: {name} has values that are not finite")
    if rank:
        fuse_low_rank(unet, trained, weights)
        return info
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)
    return info


def read_info(folder: str | Path) -> dict[str, Any]:
    """Return the contents of `tuned.json` in `folder`.

    Raises:
        TavError: the file is missing or damaged.
    """
    path = Path(folder) / INFO_FILE
    info = read_json(path)
    needed = {"attention", "trainable_modules", "sha256"}
    if not isinstance(info, dict) or needed - info.keys():
        raise TavError(f"{path}: not the description of tuned weights ({', '.join(sorted(needed))} are needed)")
    modules = info["trainable_modules"]
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        raise TavError(f"{path}: trainable_modules: {modules!r} must be a list of names")
    rank = info.get("lora_rank", 0)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
        raise TavError(f"{path}: lora_rank: {rank!r} must be a whole number, 0 or more")
    return info


def _attention(unet: ModelMixin) -> dict[str, Any]:
    return {"spatial": list(unet.config.attention), "temporal": unet.config.temporal}


def _saved_parameters(unet: ModelMixin, modules: tuple[str, ...]) -> dict[str, torch.nn.Parameter]:
    """Return the trained parameters, and the norms before `attn_temp`.

    Those norms are not trained, but inflation adds them, so no base model has them, and in a model that was imported
    from other Tune-A-Video code they are not what inflation sets.
    """
    saved = trainable_parameters(unet, modules)
    if any("attn_temp" in name for name in saved):
        saved |= {name: value for name, value in unet.named_parameters() if ".norm_temp." in name}
    return saved
