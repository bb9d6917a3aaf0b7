"""Layers of the image model that keep less memory for the backward pass where their weights are frozen.

Most of the model is frozen while it is tuned. torch keeps the input of a convolution even if its kernel needs no gradient,
and the input of every norm, activation and product. Here a frozen convolution keeps only its kernel, and what is cheap to
compute is computed again from its input. Values, gradients and the names of the weights are those of torch's own layers.

The norms compute in the precision of their input, with statistics in float32. So they do under autocast, which would
otherwise keep copies of all activations in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.grad import conv2d_input


def recompute(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """Return `function(*inputs)`, keeping only the inputs for the backward pass, which computes the rest again.

    The function must be deterministic, and only its inputs may need gradients. `torch.utils.checkpoint` does the same with
    more work for each call, which shows in small models.
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
    """Return whether no parameter of the module itself, submodules aside, is trained."""
    return not any(parameter.requires_grad for parameter in module.parameters(recurse=False))


class Conv2d(nn.Conv2d):
    """A convolution that keeps its input only if its kernel is trained."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Convolve images, `b c h w` -> `b c' h' w'`."""
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
        return functional.conv2d(images, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        grad = conv2d_input(ctx.shape, weight.to(grad_out.dtype), grad_out, ctx.stride, ctx.padding)
        return grad, None, None, None, None


class GroupNorm(nn.GroupNorm):
    """Group norm, alone or together with the activation that follows it."""

    def forward(
        self, images: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Normalise `b c ...` over each group of channels, and apply the activation."""

        def norm(images: torch.Tensor) -> torch.Tensor:
            with torch.autocast(images.device.type, enabled=False):
                normed = functional.group_norm(images, self.num_groups, *_affine(self, images), self.eps)
                return normed if activation is None else activation(normed)

        return recompute(norm, images) if is_frozen(self) else norm(images)


class LayerNorm(nn.LayerNorm):
    """Layer norm in the precision of its input."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Normalise `b n c` over its channels."""
        with torch.autocast(tokens.device.type, enabled=False):
            return functional.layer_norm(tokens, self.normalized_shape, *_affine(self, tokens), self.eps)


def _affine(norm: nn.GroupNorm | nn.LayerNorm, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the norm's weight and bias in the precision of its input. On a CPU, they may stay in float32."""
    if images.device.type == "cpu" and norm.weight.dtype == torch.float32:
        return norm.weight, norm.bias
    return norm.weight.to(images.dtype), norm.bias.to(images.dtype)


class GEGLU(nn.Module):
    """`(x W + b) * gelu(x V + c)` (Shazeer, arXiv 2002.05202), with W and V in one matrix, as in the image model."""

    def __init__(self, dim: int, inner_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner_dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens `b n c` to `b n c'`."""
        # Two products rather than two halves of one product, because contiguous tensors are read and multiplied faster.
        value, gate = (
            functional.linear(tokens, weight, bias)
            for weight, bias in zip(self.proj.weight.chunk(2), self.proj.bias.chunk(2), strict=True)
        )
        return recompute(_gated, value, gate)


def _gated(value: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return value * functional.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width, and a linear layer back."""

    def __init__(self, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(dim, 4 * dim), nn.Dropout(dropout), nn.Linear(4 * dim, dim)])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens `b n c` to `b n c`."""
        for layer in self.net:
            tokens = layer(tokens)
        return tokens
