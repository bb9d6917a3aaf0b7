"""The fused attention of torch for CPUs, with the logarithm of the softmax's denominator.

`torch.nn.functional.scaled_dot_product_attention` computes that logarithm too but does not return it. The operators
beneath it do. They are private: a version of torch may lack them, and `available` says so.
"""

from __future__ import annotations

import torch

_aten = torch.ops.aten


def available() -> bool:
    """Return whether this version of torch has the operators."""
    return hasattr(_aten, "_scaled_dot_product_flash_attention_for_cpu") and hasattr(
        _aten, "_scaled_dot_product_flash_attention_for_cpu_backward"
    )


def flash_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention, `b heads n d`, and the log-sum-exp of its scores, `b heads n`.

    Args:
        query: `b heads n d`.
        key: `b heads m d`.
        value: `b heads m d`.
    """
    return _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)


def flash_attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value.

    `out` and `logsumexp` may be those of attention to more keys than these; the gradients are then the share of these.
    """
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, query, key, value, out, logsumexp, 0.0, False
    )
