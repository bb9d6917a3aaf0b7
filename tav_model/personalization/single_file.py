"""Single-file Stable Diffusion checkpoints, in the layout of the original code (CompVis, Stability AI)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tav_model.errors import TavError, first_line
from tav_model.personalization.weight_files import SDXL, UNET_NAMES, read_weights
from tav_model.weight_checks import COMPUTED, quiet

VAE_NAMES = "first_stage_model."
CLIP_NAMES = "cond_stage_model.transformer."
OPEN_CLIP_NAMES = "cond_stage_model.model."
# Outputs that the text encoder of a diffusion model does not use.
_UNUSED = ("text_projection.weight", "logit_scale")


def load_single_file(path: Path, networks: Mapping[str, Any]) -> dict[str, torch.dtype]:
    """Read the weights of a checkpoint into `networks`, which have the architecture. Nothing is downloaded.

    Args:
        path: a safetensors file.
        networks: the base model's `unet`, `vae` and `text_encoder`, whose weights are replaced. A checkpoint may lack a
            VAE and a text encoder, which then stay the base model's.

    Returns:
        The precision in which the file has each network that it replaces.

    Raises:
        TavError: the file is no such checkpoint, or is one of another architecture than the base model. Networks may then
            have been changed.
    """
    tensors, _ = read_weights(path)
    if any(name.startswith("conditioner.embedders.") for name in tensors):
        raise TavError(f"{path}: a checkpoint {SDXL}")
    if not any(name.startswith(UNET_NAMES) for name in tensors):
        advice = "; for a LoRA, use --lora" if any("lora" in name for name in tensors) else ""
        raise TavError(f"{path}: not a Stable Diffusion checkpoint: nothing in it is named {UNET_NAMES}*{advice}")
    precisions = {}
    for part, network in networks.items():
        try:
            with quiet():
                weights = _converted(part, network, tensors)
        except (KeyError, IndexError, AttributeError, TypeError, RuntimeError) as error:
            raise TavError(
                f"{path}: its {part} cannot be converted with the config of --from ({first_line(error)})"
            ) from None
        if weights:
            _load(path, part, network, weights)
            precisions[part] = next(iter(weights.values())).dtype
    return precisions


def _converted(part: str, network: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of a network by its own names; none where the file does not have it."""
    from diffusers.loaders import single_file_utils

    def has(beginning: str) -> bool:
        return any(name.startswith(beginning) for name in tensors)

    if part == "unet":
        return single_file_utils.convert_ldm_unet_checkpoint(tensors, config=network.config)
    if part == "vae":
        return single_file_utils.convert_ldm_vae_checkpoint(tensors, config=network.config) if has(VAE_NAMES) else {}
    if has(CLIP_NAMES):
        weights = single_file_utils.convert_ldm_clip_checkpoint(tensors)
    elif has(OPEN_CLIP_NAMES):
        weights = single_file_utils.convert_open_clip_checkpoint(network, tensors, prefix=OPEN_CLIP_NAMES)
    else:
        return {}
    own = network.state_dict()
    # Depending on the version of transformers, the encoder's own names begin with text_model.
    named = {name if name in own else name.removeprefix("text_model."): value for name, value in weights.items()}
    return {name: value for name, value in named.items() if not name.endswith((COMPUTED, *_UNUSED))}


def _load(path: Path, part: str, network: Any, weights: Mapping[str, torch.Tensor]) -> None:
    own = network.state_dict()
    advice = "--from must be a base model of the same architecture"
    if unmatched := sorted(own.keys() ^ weights.keys()):
        count = len(unmatched)
        raise TavError(
            f"{path}: its {part} does not fit: {unmatched[0]} is in only one of them ({count} such names); {advice}"
        )
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise TavError(
                f"{path}: its {part} does not fit: {name} is {tuple(tensor.shape)}, in the base model "
                f"{tuple(own[name].shape)}; {advice}"
            )
    network.load_state_dict(weights)
