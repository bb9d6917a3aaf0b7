"""Attention to keys that lie in several places, as if they were concatenated, without copying them. For CPUs.

The softmax over keys `[K_1 ; K_2]` is a weighted mean of the softmaxes over each. The weights follow from the logarithms
of their denominators, which fused attention computes anyway (Milakov and Gimelshein, arXiv 1805.02867):

    l = log(exp(l_1) + exp(l_2)),   out = exp(l_1 - l) out_1 + exp(l_2 - l) out_2

The gradients need no such weights: given `out` and `l` over all keys, the backward pass of fused attention returns the
share of each part of them (Dao, arXiv 2307.08691).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from einops import rearrange

from tav_model.networks import cpu_kernels
from tav_model.networks.attention_plan import AttentionBlock


def split_key_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: Sequence[Sequence[AttentionBlock]]
) -> torch.Tensor:
    """Return attention across frames, `b f heads n d`.

    Args:
        query: `b f heads n d`.
        key: `b k heads n d`, of k frames.
        value: as `key`.
        blocks: which frames attend to which keys, see `AttentionPlan.blocks`.
    """
    return _SplitKeyAttention.apply(query, key, value, blocks)


class _SplitKeyAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        blocks: Sequence[Sequence[AttentionBlock]],
    ) -> torch.Tensor:
        out = _empty_like_tokens(query)
        b, f, heads, n, _ = query.shape
        precise = torch.promote_types(query.dtype, torch.float32)
        logsumexp = rearrange(torch.empty(b, heads, f, n, dtype=precise), "b heads f n -> b f heads n")
        for place, group in enumerate(blocks):
            for block in group:
                for (q, o, lse), (k, v) in _block_views(block, (query, out, logsumexp), (key, value)):
                    block_out, block_lse = cpu_kernels.flash_attention(q, k, v)
                    if place == 0:
                        o.copy_(block_out)
                        lse.copy_(block_lse)
                    else:
                        joint = torch.logaddexp(lse, block_lse)
                        weight = torch.exp(block_lse - joint)[..., None]
                        o.copy_(torch.lerp(o.to(precise), block_out.to(precise), weight))
                        lse.copy_(joint)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        ctx.blocks = blocks
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, logsumexp = ctx.saved_tensors
        grad_query = _empty_like_tokens(query)
        grad_key, grad_value = _empty_like_tokens(key).zero_(), _empty_like_tokens(value).zero_()
        of_queries, of_keys = (query, out, logsumexp, grad_out, grad_query), (key, value, grad_key, grad_value)
        for place, group in enumerate(ctx.blocks):
            for block in group:
                for (q, o, lse, grad_o, grad_q), (k, v, grad_k, grad_v) in _block_views(block, of_queries, of_keys):
                    block_grad_q, block_grad_k, block_grad_v = cpu_kernels.flash_attention_backward(
                        grad_o, q, k, v, o, lse
                    )
                    if place == 0:
                        grad_q.copy_(block_grad_q)
                    else:
                        grad_q.add_(block_grad_q)
                    grad_k.add_(block_grad_k)
                    grad_v.add_(block_grad_v)
        return grad_query, grad_key, grad_value, None


def _empty_like_tokens(tensor: torch.Tensor) -> torch.Tensor:
    """Return an empty tensor of the same shape, `b f heads n d`, in the memory order `b f n heads d`.

    In that order the heads are joined without a copy.
    """
    b, f, heads, n, d = tensor.shape
    return rearrange(tensor.new_empty(b, f, n, heads, d), "b f n heads d -> b f heads n d")


def _block_views(
    block: AttentionBlock, of_queries: Sequence[torch.Tensor], of_keys: Sequence[torch.Tensor]
) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Yield the share of one call of fused attention, as views `batch heads n ...` of the given `b f heads n ...`."""
    frames, keys = slice(block.start, block.stop), slice(block.keys_start, block.keys_stop)
    if block.diagonal:
        # Videos and frames fold into one dimension only where all frames take part.
        for video in range(of_queries[0].shape[0]):
            yield [x[video, frames] for x in of_queries], [x[video, keys] for x in of_keys]
    else:
        yield (
            [x[:, frames].movedim(1, 2).flatten(2, 3) for x in of_queries],
            [x[:, keys].movedim(1, 2).flatten(2, 3) for x in of_keys],
        )
