"""Layers of the image model that keep less memory for the backward pass where their weights are frozen.

Most of the model is frozen while it is tuned. torch keeps the input of a convolution even if its kernel needs no gradient,
and the input of every norm, activation and product. Here a frozen convolution keeps only its kernel, and what is cheap to
compute is computed again from its input. Values, gradients and the names of the weights are those of torch's own layers.

The norms compute in the precision of their input, with statistics in float32. So they do under autocast, which would
otherwise keep copies of all activations in float32.

`torch.compile` decides by itself what is kept and what is computed again; it gets the plain operations.

On a CPU, tensors of some megabytes are computed again even where that takes matrix products: see `is_large`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.nn.grad import conv2d_input

LARGE_BYTES = 2**20


def is_large(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is worth being computed again by more than a norm or an activation.

    In small models memory does not matter, and on a GPU time matters more: there, gradient checkpointing is for those who
    need memory.
    """
    large = tensor.device.type == "cpu" and tensor.numel() * tensor.element_size() > LARGE_BYTES
    return large and not torch.compiler.is_compiling()


def recompute(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """Return `function(*inputs)`, keeping only the inputs for the backward pass, which computes the rest again.

    The function must be deterministic, and only its inputs may need gradients. `torch.utils.checkpoint` does the same with
    more work for each call, which shows in small models.
    """
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    if needs_gradient and not torch.compiler.is_compiling():
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


def recomputed(
    tensor: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor], argument: torch.Tensor
) -> AbstractContextManager[Any]:
    """Keep `argument` in place of `tensor`, which is `function(argument)`, for the backward pass of what the context runs.

    The function is called again for each operation that needs the tensor. Small tensors are kept as they are.
    """
    if not (torch.is_grad_enabled() and is_large(tensor)):
        return nullcontext()
    storage = tensor.untyped_storage().data_ptr()
    kept = argument.detach()

    def pack(saved: torch.Tensor) -> Any:
        if saved.untyped_storage().data_ptr() != storage:
            return saved
        return saved.size(), saved.stride(), saved.storage_offset()  # It may be a view of the tensor.

    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        with torch.no_grad():
            return function(kept).as_strided(*packed)

    return saved_tensors_hooks(pack, unpack)


def is_frozen(module: nn.Module) -> bool:
    """Return whether no parameter of the module itself, submodules aside, is trained."""
    return not any(parameter.requires_grad for parameter in module.parameters(recurse=False))


class Conv2d(nn.Conv2d):
    """A convolution that keeps its input only if its kernel is trained."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Convolve images, `b c h w` -> `b c' h' w'`."""
        needs_gradient = torch.is_grad_enabled() and images.requires_grad
        if needs_gradient and is_frozen(self) and not torch.compiler.is_compiling():
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

    def forward(self, tokens: torch.Tensor, norm: Callable[[torch.Tensor], torch.Tensor] | None = None) -> torch.Tensor:
        """Map tokens `b n c` to `b n c'`, after `norm`, which must be frozen, if there is one."""
        if torch.is_grad_enabled() and tokens.requires_grad and self._is_recomputed(tokens):
            # The products take a twentieth of a tuning step; their results are a quarter of all that it keeps.
            return _FrozenGEGLU.apply(tokens, self, norm)
        return recompute(_gated, *self._factors(tokens, norm))

    def _is_recomputed(self, tokens: torch.Tensor) -> bool:
        kind = tokens.device.type
        computes_in = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tokens.dtype
        # In one precision, so that nothing is cast.
        return is_large(tokens) and is_frozen(self.proj) and tokens.dtype == computes_in == self.proj.weight.dtype

    def _factors(
        self, tokens: torch.Tensor, norm: Callable[[torch.Tensor], torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the value and the gate before its activation, each `b n c'`."""
        normed = tokens if norm is None else norm(tokens)
        # Two products rather than two halves of one product, because contiguous tensors are read and multiplied faster.
        value, gate = (
            functional.linear(normed, weight, bias)
            for weight, bias in zip(self.proj.weight.chunk(2), self.proj.bias.chunk(2), strict=True)
        )
        return value, gate


class _FrozenGEGLU(torch.autograd.Function):
    """Keeps only the tokens before the norm, and frees each of the large tensors of the backward pass after its last use."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, layer: GEGLU, norm: Any) -> torch.Tensor:
        ctx.save_for_backward(tokens)
        ctx.layer, ctx.norm = layer, norm
        return _gated(*layer._factors(tokens, norm))

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        value_weight, gate_weight = ctx.layer.proj.weight.chunk(2)
        with torch.enable_grad():
            tokens = tokens.detach().requires_grad_()
            normed = tokens if ctx.norm is None else ctx.norm(tokens)
        value, gate = ctx.layer._factors(normed.detach(), None)
        grad_value = functional.gelu(gate).mul_(grad_out)
        grad_normed = grad_value @ value_weight
        del grad_value
        grad_gate = torch.ops.aten.gelu_backward(value.mul_(grad_out), gate)
        del value, gate
        grad_normed += grad_gate @ gate_weight
        del grad_gate
        if ctx.norm is None:
            return grad_normed, None, None
        normed.backward(grad_normed)  # Not `autograd.grad`, with which torch cannot count operations here.
        return tokens.grad, None, None


def _gated(value: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return value * functional.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width, and a linear layer back."""

    def __init__(self, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(dim, 4 * dim), nn.Dropout(dropout), nn.Linear(4 * dim, dim)])

    def forward(self, tokens: torch.Tensor, norm: LayerNorm | None = None) -> torch.Tensor:
        """Map tokens `b n c` to `b n c`, after `norm` if there is one."""
        if norm is not None and not is_frozen(norm):
            tokens, norm = norm(tokens), None
        gate, dropout, out = self.net
        return out(dropout(gate(tokens, norm)))
