"""Control networks: which ones there are, loading them from diffusers' layout, and whether they fit a base model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from tav_model.errors import TavError
from tav_model.files import read_json
from tav_model.weight_checks import check_files, check_loaded, quiet, reason

if TYPE_CHECKING:
    from diffusers import ControlNetModel, T2IAdapter

KINDS = ("ControlNetModel", "T2IAdapter")


def control_networks(network: nn.Module | Sequence[nn.Module]) -> list[Any]:
    """Return the control networks that a `MultiControlNetModel` or a list holds, or a single one as a list.

    Raises:
        ValueError: there is none, or something else among them.
    """
    from diffusers import ControlNetModel, MultiControlNetModel, T2IAdapter

    if isinstance(network, MultiControlNetModel):
        networks = list(network.nets)
    elif isinstance(network, nn.Module):
        networks = [network]
    else:
        networks = list(network)
    if not networks:
        raise ValueError("controlnet: no network")
    for one in networks:
        if not isinstance(one, (ControlNetModel, T2IAdapter)):
            raise ValueError(f"controlnet: {type(one).__name__} must be one of {', '.join(KINDS)}")
    return networks


def load_control_network(path: str | Path, **kwargs: Any) -> ControlNetModel | T2IAdapter:
    """Load a ControlNet or a T2I-Adapter in eval mode; its config says which one it is.

    Args:
        path: a folder in diffusers' layout (`.safetensors` or `.bin`), or a hub id.
        kwargs: for its `from_pretrained`, such as `subfolder`, `torch_dtype`, `variant`, `revision`.

    Raises:
        TavError: there is no such network, or its weights are missing, surplus or not finite.
    """
    import diffusers

    if Path(path).exists():
        kwargs.setdefault("local_files_only", True)
    kind = _network_class(path, kwargs)
    try:
        with quiet():
            network, loading = getattr(diffusers, kind).from_pretrained(path, output_loading_info=True, **kwargs)
    except Exception as error:  # Damaged files make diffusers raise errors of any type.
        raise TavError(f"{path}: no {kind} can be loaded from it ({reason(error)})") from error
    check_loaded(str(path), network, loading)
    return network.eval()


def check_control_network(path: str | Path, base: str | Path) -> None:
    """Check by their configs that a control network was made for a base model. No weights are read.

    Args:
        path: a folder in diffusers' layout, or a hub id.
        base: the same of the base model.

    Raises:
        TavError: there is no such network, or it was made for another base model.
    """
    import diffusers
    import torch

    kind = _network_class(path, {})
    try:
        with quiet(), torch.device("meta"):
            network_class, unet_class = getattr(diffusers, kind), diffusers.UNet2DConditionModel
            network = network_class.from_config(network_class.load_config(path))
            unet = unet_class.from_config(unet_class.load_config(base, subfolder="unet"))
            vae = diffusers.AutoencoderKL.load_config(base, subfolder="vae")
    except Exception as error:  # Damaged files make diffusers raise errors of any type.
        raise TavError(f"{path}: cannot be compared with the base model {base} ({reason(error)})") from error
    try:
        check_fits(network, unet, 2 ** (len(vae.get("block_out_channels", ["one"])) - 1))
    except TavError as error:
        raise TavError(f"{path}: {error}") from None


def _network_class(path: str | Path, kwargs: dict[str, Any]) -> str:
    """Return one of `KINDS`, as the config of a control network says.

    Raises:
        TavError: there is no such network.
    """
    if Path(path).exists():
        folder = Path(path) / (kwargs.get("subfolder") or "")
        check_files(folder)
        config = folder / "config.json"
        kind = read_json(config).get("_class_name") if config.exists() else None
        if kind is None:
            raise TavError(f"{folder}: no control network (config.json with the _class_name of one is needed)")
    else:
        kind = _class_on_hub(str(path), kwargs)
    if kind not in KINDS:
        raise TavError(f"{path}: {kind!r} is no control network; allowed: {', '.join(KINDS)}")
    return str(kind)


def _class_on_hub(name: str, kwargs: dict[str, Any]) -> Any:
    from diffusers import ControlNetModel

    selected = {key: kwargs[key] for key in ("subfolder", "revision", "local_files_only", "cache_dir") if key in kwargs}
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ControlNetModel.load_config(name, **selected).get("_class_name")
    except Exception as error:  # The hub's clients raise errors of many types.
        raise TavError(f"{name}: no such folder, and no such control network on the hub ({reason(error)})") from error


def pixels_per_latent(network: Any) -> int:
    """Return how many pixels of the condition, in height and in width, belong to one of the latents."""
    from diffusers import T2IAdapter

    if isinstance(network, T2IAdapter):
        return network.config.downscale_factor
    return 2 ** (len(network.config.conditioning_embedding_out_channels) - 1)


def check_fits(network: Any, unet: Any, vae_scale_factor: int) -> None:
    """Check that a control network was made for the base model of a UNet.

    Args:
        network: a `ControlNetModel` or a `T2IAdapter`.
        unet: the UNet that it is to control.
        vae_scale_factor: pixels for each of the latents.

    Raises:
        TavError: it was made for another base model.
    """
    from diffusers import T2IAdapter

    theirs, ours = network.config, unet.config
    widths = tuple(ours.block_out_channels)
    pairs: dict[str, tuple[Any, Any]] = {}
    if isinstance(network, T2IAdapter):
        if theirs.adapter_type == "full_adapter_xl":
            raise TavError("the control network is of Stable Diffusion XL; Stable Diffusion 1 and 2 are supported")
        # A light adapter has one more level, as wide as its last.
        light = theirs.adapter_type == "light_adapter"
        made = tuple(theirs.channels) + (tuple(theirs.channels[-1:]) if light else ())
        pairs["channels"] = (made, widths)
    else:
        pairs["block_out_channels"] = (tuple(theirs.block_out_channels), widths)
        levels = len(widths)
        for name in ("in_channels", "cross_attention_dim", "layers_per_block"):
            made_for, used = getattr(theirs, name), getattr(ours, name)
            if name != "in_channels":
                made_for, used = _per_level(made_for, levels), _per_level(used, levels)
            pairs[name] = (made_for, used)
        for name in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type"):
            pairs[name] = (getattr(theirs, name), None)
    pairs["pixels for each of the latents"] = (pixels_per_latent(network), vae_scale_factor)
    for name, (made_for, used) in pairs.items():
        if made_for != used:
            raise TavError(f"the control network was made for another base model: its {name} is {made_for}, not {used}")


def _per_level(value: Any, levels: int) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels
