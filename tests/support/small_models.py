"""The stand-in base model at a size whose forward pass takes milliseconds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.standin import Size, make_base, random_weights, unet_config

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

TINY = Size(
    block_out_channels=(8, 16),
    layers_per_block=1,
    cross_attention_dim=16,
    heads=2,
    norm_num_groups=4,
    vae_channels=(4, 8, 8, 8),
)


def small_base(folder: Path, kind: str = "sd1", seed: int = 0, **changes: Any) -> Path:
    """A whole base model in ``folder``, of the shape "sd1" or "sd2"; ``changes`` are fields of `Size`."""
    make_base(folder, kind, seed, dataclasses.replace(TINY, **changes))
    return folder


def small_unet2d(kind: str = "sd1", seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """The UNet of `small_base`; ``changes`` are fields of `Size`, or else entries of the UNet's config."""
    import torch
    from diffusers import UNet2DConditionModel

    of_size = {name: changes.pop(name) for name in set(changes) & {field.name for field in dataclasses.fields(Size)}}
    unet = UNet2DConditionModel.from_config(unet_config(kind, dataclasses.replace(TINY, **of_size)) | changes)
    unet.load_state_dict({name: torch.from_numpy(array) for name, array in random_weights(unet, seed).items()})
    return unet.eval()
