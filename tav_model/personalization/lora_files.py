"""LoRA files (Hu et al., arXiv 2106.09685) of diffusers, PEFT and kohya's scripts, and their fusion into a base model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from tav_model.errors import TavError
from tav_model.files import read_json
from tav_model.personalization.weight_files import SDXL, UNET_NAMES, read_weights

UNET, TEXT_ENCODER = "unet", "text_encoder"
# The ends of names, by which of the two matrices (or the number alpha) it is.
_ENDS = {
    "down": re.compile(r"(\.lora_down|\.lora_A|\.lora_A\.default|(_lora|\.lora|\.lora_linear_layer)\.down)\.weight$"),
    "up": re.compile(r"(\.lora_up|\.lora_B|\.lora_B\.default|(_lora|\.lora|\.lora_linear_layer)\.up)\.weight$"),
    "alpha": re.compile(r"\.alpha$"),
}
# The beginnings of names, longest first, and the network that they mean; "": whichever has the module.
_BEGINNINGS = {
    "lora_unet_": UNET,
    "lora_te1_": TEXT_ENCODER,
    "lora_te_": TEXT_ENCODER,
    "unet.": UNET,
    "text_encoder.": TEXT_ENCODER,
    "base_model.model.": "",
}
_OF_SDXL = ("lora_te2_", "text_encoder_2.")
# Other kinds of updates, by a part of their names.
_OTHER_KINDS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "lora_mid": "LoRA in Tucker decomposition",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
}
_ALLOWED = "allowed: LoRA of diffusers, PEFT or kohya's scripts"
_TEXT_ALIASES = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


class Target(NamedTuple):
    """A module of a network, `unet` or `text_encoder`, that an update is for."""

    network: str
    module: str


@dataclass(frozen=True)
class LowRankUpdate:
    """An update of one weight, `dW = alpha / r * up @ down`.

    Attributes:
        down: `r in`, of a convolution `r in h w`.
        up: `out r`, of a convolution `out r 1 1`.
        factor: `alpha / r`.
    """

    down: torch.Tensor
    up: torch.Tensor
    factor: float

    def delta(self) -> torch.Tensor:
        """Return `dW` in float32, `out (in h w)`."""
        return self.factor * self.up.float().flatten(1) @ self.down.float().flatten(1)


def read_lora(path: Path, networks: Mapping[str, nn.Module]) -> dict[Target, LowRankUpdate]:
    """Return the updates in a LoRA file by the module that they are for.

    Read are the names of diffusers, of PEFT (with `adapter_config.json` beside the file, or the metadata that diffusers
    writes, for alpha) and of kohya's scripts. Without an alpha, it is the rank.

    Args:
        path: a safetensors file.
        networks: the networks that it may update, as `unet` and `text_encoder`.

    Raises:
        TavError: the file is none, is of another kind or for another base model, or is incomplete.
    """
    tensors, metadata = read_weights(path)
    if any(name.startswith(UNET_NAMES) for name in tensors):
        raise TavError(f"{path}: not a LoRA; for a checkpoint, use --single-file")
    modules = _modules_by_flat_name(networks)
    parts: dict[Target, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if any(name.startswith(beginning) for beginning in _OF_SDXL):
            raise TavError(f"{path}: a LoRA {SDXL}")
        written, part = _split(path, name)
        target = _target(written, modules)
        if target is None:
            raise TavError(f"{path}: the base model has no module {written}; a LoRA of another base model?")
        parts.setdefault(target, {})[part] = tensor
    factors = _Factors(path, metadata)
    return {target: _update(path, target, part, networks, factors) for target, part in sorted(parts.items())}


def fuse(network: nn.Module, module: str, update: LowRankUpdate, scale: float) -> None:
    """Add `scale * dW` to the weight of a module of `network`, in float32, rounded to the weight's own precision once."""
    weight = _weight(network, module)
    with torch.no_grad():
        weight.copy_(weight.float() + scale * update.delta().view(weight.shape).to(weight.device))


def _modules_by_flat_name(networks: Mapping[str, nn.Module]) -> dict[tuple[str, str], str]:
    """Return the linear layers and convolutions by network and by each way to write their names, dots as underscores."""
    modules: dict[tuple[str, str], str] = {}
    for network, model in networks.items():
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear | nn.Conv2d):
                continue
            names = {name, name.removesuffix(".0") if name.endswith("to_out.0") else name}
            if network == TEXT_ENCODER:
                # Depending on the version of transformers, the encoder's own names begin with text_model.
                names |= {f"text_model.{name}", name.removeprefix("text_model.")}
                stem, _, last = name.rpartition(".")
                names |= {f"{start}{stem}.{_TEXT_ALIASES.get(last, last)}" for start in ("", "text_model.")}
            modules |= {(network, one.replace(".", "_")): name for one in names}
    return modules


def _weight(network: nn.Module, module: str) -> torch.Tensor:
    return network.get_parameter(f"{module}.weight")


def _split(path: Path, name: str) -> tuple[str, str]:
    """Return a name without its end, and what the end means.

    Raises:
        TavError: the name is of no LoRA.
    """
    for mark, kind in _OTHER_KINDS.items():
        if mark in name:
            raise TavError(f"{path}: {kind}, which is not supported; {_ALLOWED}")
    for part, end in _ENDS.items():
        if match := end.search(name):
            return name[: match.start()], part
    raise TavError(f"{path}: {name} is no part of a LoRA; {_ALLOWED}")


def _target(written: str, modules: Mapping[tuple[str, str], str]) -> Target | None:
    network = ""
    for beginning, meant in _BEGINNINGS.items():
        if written.startswith(beginning):
            written, network = written.removeprefix(beginning), meant
            break
    flat = written.replace(".processor.", ".").replace(".", "_")
    for candidate in [network] if network else [UNET, TEXT_ENCODER]:
        if (candidate, flat) in modules:
            return Target(candidate, modules[candidate, flat])
    return None


def _update(
    path: Path,
    target: Target,
    parts: Mapping[str, torch.Tensor],
    networks: Mapping[str, nn.Module],
    factors: _Factors,
) -> LowRankUpdate:
    if missing := {"down", "up"} - parts.keys():
        raise TavError(f"{path}: incomplete: {target.module} has no {min(missing)} matrix")
    down, up = parts["down"], parts["up"]
    weight = _weight(networks[target.network], target.module)
    rank = down.shape[0]
    fits = rank > 0 and down.ndim in (2, 4) and up.ndim in (2, 4) and up.flatten(1).shape[1] == rank
    shape = (up.shape[0], math.prod(down.shape[1:]))
    expected = (weight.shape[0], math.prod(weight.shape[1:]))
    if not fits or shape != expected:
        raise TavError(
            f"{path}: {target.module}: {tuple(up.shape)} times {tuple(down.shape)} does not fit the base model's weight, "
            f"{tuple(weight.shape)}; a LoRA of another base model?"
        )
    if "alpha" in parts and parts["alpha"].numel() != 1:
        raise TavError(f"{path}: {target.module}: alpha must be one number")
    alpha = float(parts["alpha"]) / rank if "alpha" in parts else factors.of(target, rank)
    return LowRankUpdate(down, up, alpha)


class _Factors:
    """`alpha / r` of each module where a config says so: diffusers' metadata, or PEFT's `adapter_config.json`."""

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self._config: dict[str, Any] = {}
        beside = path.parent / "adapter_config.json"
        if "lora_adapter_metadata" in metadata:
            try:
                self._config = json.loads(metadata["lora_adapter_metadata"])
            except ValueError as error:
                raise TavError(f"{path}: its metadata is no JSON ({error})") from None
            where = f"{path}: its metadata"
        elif path.name == "adapter_model.safetensors" and beside.is_file():
            self._config, where = read_json(beside), str(beside)
        else:
            return
        if not isinstance(self._config, dict):
            raise TavError(f"{where}: not the config of a LoRA")
        self._where = where
        if self._config.get("use_dora") or any(self._config.get(f"{n}.use_dora") for n in (UNET, TEXT_ENCODER)):
            raise TavError(f"{where}: DoRA, which is not supported; allowed: LoRA")

    def of(self, target: Target, rank: int) -> float:
        """Return the factor of a module whose update has this rank; 1 without a config."""
        config = self._config
        if any(key.startswith(f"{target.network}.") for key in config):
            prefix = f"{target.network}."
            config = {key.removeprefix(prefix): value for key, value in config.items() if key.startswith(prefix)}
        if not config:
            return 1.0
        alpha = config.get("lora_alpha", rank)
        patterns = config.get("alpha_pattern") or {}
        for name, value in patterns.items() if isinstance(patterns, dict) else ():
            if f".{target.module}".endswith(f".{name}"):
                alpha = value
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise TavError(f"{self._where}: lora_alpha: {alpha!r} must be a number")
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
