"""Layers of the image model that keep less for the backward pass where their weights are frozen.

Most of the model is frozen while it is tuned. Torch keeps a convolution's input even if its kernel wants no gradient, and
the input of every norm, activation and product. Here a frozen convolution keeps its kernel alone, and what is cheap is
computed again from its input. Values and gradients are those of torch's own layers, and so are the names of the weights.

The norms work in the precision of what they are given, with statistics in float32, under autocast too: it would keep
copies of every activation in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.grad import conv2d_input


def recompute(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """`function(*inputs)`, of which the backward pass keeps the inputs alone and computes the rest again.

    The function must be deterministic, and want gradients for nothing but its inputs.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return _Recompute.apply(function, *inputs)
    return function(*inputs)


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            out = ctx.function(*inputs)
        return (None, *torch.autograd.grad(out, inputs, grad_out))


def is_frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters(recurse=False))


class Conv2d(nn.Conv2d):
    """A convolution that keeps its input only where its kernel is trained."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """`b c h w` -> `b c' h' w'`."""
        if is_frozen(self) and images.requires_grad and torch.is_grad_enabled():
            return _FrozenConv2d.apply(images, self.weight, self.bias, self.stride, self.padding)
        return super().forward(images)


class _FrozenConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: torch.Tensor, weight: torch.Tensor, bias: Any, stride: Any, padding: Any
    ) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.stride, ctx.padding = images.shape, stride, padding
        return F.conv2d(images, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        grad = conv2d_input(ctx.shape, weight.to(grad_out.dtype), grad_out, ctx.stride, ctx.padding)
        return grad, None, None, None, None


class GroupNorm(nn.GroupNorm):
    """Group norm, by itself or with the activation that follows it."""

    def forward(
        self, images: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """`b c ...` -> `b c ...`."""

        def norm(images: torch.Tensor) -> torch.Tensor:
            with torch.autocast(images.device.type, enabled=False):
                normed = F.group_norm(images, self.num_groups, *_affine(self, images), self.eps)
                return normed if activation is None else activation(normed)

        return recompute(norm, images) if is_frozen(self) else norm(images)


class LayerNorm(nn.LayerNorm):
    """Layer norm in the precision of its input."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`b n c` -> `b n c`."""
        with torch.autocast(tokens.device.type, enabled=False):
            return F.layer_norm(tokens, self.normalized_shape, *_affine(self, tokens), self.eps)


def _affine(norm: nn.GroupNorm | nn.LayerNorm, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm's weight and bias. On a CPU they may be of higher precision than what is normed."""
    if images.device.type == "cpu" and norm.weight.dtype == torch.float32:
        return norm.weight, norm.bias
    return norm.weight.to(images.dtype), norm.bias.to(images.dtype)


class GEGLU(nn.Module):
    """`(x W + b) * gelu(x V + c)` (Shazeer, arXiv 2002.05202), with W and V in one matrix, as the image model has them."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner_dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`b n c` -> `b n c'`."""
        # Two products rather than halves of one: whole tensors are read and multiplied faster.
        value, gate = (
            F.linear(tokens, weight, bias)
            for weight, bias in zip(self.proj.weight.chunk(2), self.proj.bias.chunk(2), strict=True)
        )
        return recompute(_gated, value, gate)


def _gated(value: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width, and back."""

    def __init__(self, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(dim, 4 * dim), nn.Dropout(dropout), nn.Linear(4 * dim, dim)])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`b n c` -> `b n c`."""
        for layer in self.net:
            tokens = layer(tokens)
        return tokens
