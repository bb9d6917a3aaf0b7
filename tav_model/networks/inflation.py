"""Inflation: an image UNet of Stable Diffusion becomes a video UNet with the same weights.

Tune-A-Video (arXiv 2212.11565), section 3.2: 2D convolutions work frame by frame, self-attention becomes sparse-causal
attention across frames, and every transformer block gets a temporal attention whose output starts at zero.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from torch import nn

from tav_model.errors import TavError
from tav_model.networks.attention_plan import TUNE_A_VIDEO
from tav_model.networks.transformer import BasicTransformerBlock
from tav_model.weight_checks import check_files, check_loaded, quiet, reason

VideoUNet = TypeVar("VideoUNet", bound=ModelMixin)


def load_inflated(
    unet_class: type[VideoUNet],
    path: str | Path,
    subfolder: str | None = "unet",
    attention: Sequence[str] = TUNE_A_VIDEO,
    temporal: bool = True,
    **kwargs: Any,
) -> VideoUNet:
    """Inflate the image UNet in a folder of diffusers' layout (`.safetensors` or `.bin`) or of a hub id.

    Args:
        unet_class: the class of the video UNet.
        path: the folder or the hub id.
        subfolder: where the UNet is within it.
        attention: see `tav_model.networks.attention_plan`.
        temporal: whether the temporal attention takes part.
        kwargs: for `UNet2DConditionModel.from_pretrained`, such as `torch_dtype`, `variant`, `revision`.

    Raises:
        TavError: there is no such model, it is not of Stable Diffusion's architecture, or its weights are missing,
            surplus or not finite.
    """
    if Path(path).exists():
        kwargs.setdefault("local_files_only", True)
        check_files(Path(path) / (subfolder or ""))
    try:
        with quiet():
            image_unet, loading = UNet2DConditionModel.from_pretrained(
                path, subfolder=subfolder, output_loading_info=True, **kwargs
            )
    except Exception as error:  # Damaged files make diffusers raise errors of any type.
        raise TavError(f"{path}: no image UNet can be loaded from it ({reason(error)})") from error
    check_loaded(f"{path}: its image UNet", image_unet, loading)
    try:
        return inflate(unet_class, image_unet, attention=attention, temporal=temporal)
    except TavError as error:
        raise TavError(f"{path}: {error}") from None


def inflate(
    unet_class: type[VideoUNet],
    image_unet: UNet2DConditionModel,
    attention: Sequence[str] = TUNE_A_VIDEO,
    temporal: bool = True,
) -> VideoUNet:
    """Inflate an image UNet. Its weights are shared, not copied. The result is in eval mode.

    Raises:
        TavError: the image UNet uses something that Stable Diffusion 1 and 2 do not have.
    """
    config = inflate_config(unet_class, image_unet.config) | {"attention": list(attention), "temporal": temporal}
    with torch.device("meta"):
        unet = unet_class.from_config(config)
    unet.load_state_dict(image_unet.state_dict(), strict=False, assign=True)
    for module in unet.modules():
        if isinstance(module, BasicTransformerBlock):
            _initialise_temporal_attention(module, image_unet.dtype, image_unet.device)
    missing = [name for name, tensor in unet.state_dict().items() if tensor.is_meta]
    surplus = image_unet.state_dict().keys() - unet.state_dict().keys()
    if missing or surplus:
        raise TavError(f"not the UNet of a Stable Diffusion model: {sorted([*missing, *surplus])[0]} does not fit")
    return unet.eval()


def inflate_config(unet_class: type[ModelMixin], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of an image UNet as one of the video UNet `unet_class`.

    Raises:
        TavError: the config uses something that Stable Diffusion 1 and 2 do not have.
    """
    video_arguments = inspect.signature(unet_class.__init__).parameters
    image_arguments = inspect.signature(UNet2DConditionModel.__init__).parameters
    inflated = {}
    for key, value in config.items():
        if key in video_arguments:
            inflated[key] = value
        elif key in image_arguments and value != image_arguments[key].default:
            # A feature that is off may be False, or a list of False.
            if not value or (isinstance(value, (list, tuple)) and not any(value)):
                continue
            raise TavError(f"a UNet with {key}={value!r} is not of Stable Diffusion's shape and cannot be inflated")
    for key in ("down_block_types", "up_block_types"):
        inflated[key] = [name.replace("2D", "3D") for name in inflated[key]]
    inflated["mid_block_type"] = (inflated.get("mid_block_type") or "none").replace("2D", "3D")
    return inflated


def _initialise_temporal_attention(block: BasicTransformerBlock, dtype: torch.dtype, device: torch.device) -> None:
    """Initialise the modules that inflation adds: random weights, but zero at the output."""
    for module in (block.norm_temp, block.attn_temp):
        module.to_empty(device=device).to(dtype)
        for layer in module.modules():
            if isinstance(layer, nn.Linear | nn.LayerNorm):
                layer.reset_parameters()
    block.attn_temp.zero_output()
