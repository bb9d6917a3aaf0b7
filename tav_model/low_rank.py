"""Tuning by low-rank updates (LoRA, arXiv 2106.09685): the trained modules get `W + up @ down` in place of other weights.

The temporal attention, which no image model has, starts with the queries, keys and values of the spatial attention before it,
and with an output of zero. So these frozen weights come with the base model, and only the updates are saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from tav_model.errors import TavError

if TYPE_CHECKING:
    from diffusers import ModelMixin

DOWN, UP = "lora_down", "lora_up"
_FUSED = "_low_rank_updates_fused"


class LowRankLinear(nn.Linear):
    """A linear layer with frozen weights and a trained update, `y = W x + b + up (down x)`.

    Attributes:
        lora_down: `r in`, random at first.
        lora_up: `out r`, zero at first, so that the layer at first computes what `linear` does.
    """

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        bound = linear.in_features**-0.5  # As in the paper's code: Kaiming initialisation with a = sqrt(5).
        down = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_down = nn.Parameter(down.to(linear.weight.device))
        self.lora_up = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply the layer to `... in`."""
        return super().forward(input) + functional.linear(functional.linear(input, self.lora_down), self.lora_up)


def add_low_rank(
    unet: ModelMixin, trained: Iterable[str], rank: int, generator: torch.Generator
) -> dict[str, nn.Parameter]:
    """Replace linear layers by `LowRankLinear`, and return their updates by name.

    Args:
        unet: an inflated base model, changed in place.
        trained: names of parameters, see `tav_model.tuned_weights.trainable_parameters`; the layers are theirs.
        rank: r.
        generator: draws the first `down` matrices, on the CPU.

    Raises:
        TavError: parameters of other layers than linear ones.
    """
    names = linear_layers(unet, trained)
    _prepare_temporal_attention(unet, names)
    parameters: dict[str, nn.Parameter] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        layer = LowRankLinear(unet.get_submodule(name), rank, generator)
        setattr(unet.get_submodule(parent), last, layer)
        parameters |= {f"{name}.{DOWN}": layer.lora_down, f"{name}.{UP}": layer.lora_up}
    return parameters


def low_rank_parameters(unet: ModelMixin) -> dict[str, nn.Parameter]:
    """Return the updates that a model has, by name; none where `add_low_rank` was not called."""
    return {name: value for name, value in unet.named_parameters() if name.endswith((f".{DOWN}", f".{UP}"))}


def rank_of(updates: Mapping[str, torch.Tensor]) -> int:
    """Return the rank of updates."""
    return next(value.shape[0] for name, value in updates.items() if name.endswith(DOWN))


def update_shapes(unet: ModelMixin, trained: Iterable[str], rank: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the updates that `add_low_rank` would make, by name.

    Raises:
        TavError: as `add_low_rank`.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name in linear_layers(unet, trained):
        out_features, in_features = unet.get_parameter(f"{name}.weight").shape
        shapes |= {f"{name}.{DOWN}": (rank, in_features), f"{name}.{UP}": (out_features, rank)}
    return shapes


def fuse_low_rank(unet: ModelMixin, trained: Iterable[str], updates: Mapping[str, torch.Tensor]) -> None:
    """Add updates to the weights, in float32, rounded to the precision of the weights once.

    Args:
        unet: an inflated base model, changed in place. It is an ordinary model then.
        trained: as for `add_low_rank`.
        updates: by name, of the shapes of `update_shapes`.

    Raises:
        TavError: the model has such updates already.
    """
    if getattr(unet, _FUSED, False):
        raise TavError("the model has low-rank updates already; load the base model again")
    names = linear_layers(unet, trained)
    _prepare_temporal_attention(unet, names)
    with torch.no_grad():
        for name in names:
            weight = unet.get_parameter(f"{name}.weight")
            down, up = (updates[f"{name}.{kind}"].to(weight.device, torch.float32) for kind in (DOWN, UP))
            weight.copy_(weight.float() + up @ down)
    setattr(unet, _FUSED, True)


def linear_layers(unet: ModelMixin, trained: Iterable[str]) -> list[str]:
    """Return the names of the layers of parameters.

    Raises:
        TavError: one of them is no linear layer.
    """
    owners = list(dict.fromkeys(name.rpartition(".")[0] for name in trained))
    if other := [name for name in owners if not isinstance(unet.get_submodule(name), nn.Linear)]:
        raise TavError(f"tune.trainable: {other[0]} is no linear layer, as tune.lora_rank needs")
    return owners


def _prepare_temporal_attention(unet: ModelMixin, names: Iterable[str]) -> None:
    """Copy the spatial attention before each temporal one into it, if one of its layers is among `names`.

    The output stays zero, so that the model still does what the image model does.
    """
    blocks = dict.fromkeys(name.partition(".attn_temp.")[0] for name in names if ".attn_temp." in name)
    for name in blocks:
        block: Any = unet.get_submodule(name)
        for layer in ("to_q", "to_k", "to_v"):
            block.attn_temp.get_submodule(layer).load_state_dict(block.attn1.get_submodule(layer).state_dict())
        block.norm_temp.load_state_dict(block.norm1.state_dict())
        block.attn_temp.zero_output()
