"""Attention to keys that lie in several places, as if they were concatenated, without copying them. For CPUs.

The softmax over keys `[K_1 ; K_2]` is a weighted mean of the softmaxes over each, the weights given by the logarithms of
their denominators, which fused attention computes anyway (Milakov and Gimelshein, arXiv 1805.02867):

    l = log(exp(l_1) + exp(l_2)),   out = exp(l_1 - l) out_1 + exp(l_2 - l) out_2

The gradients need no weights of their own: with `out` and `l` of the whole, the backward pass of fused attention gives
each part's share (Dao, arXiv 2307.08691).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange

aten = torch.ops.aten
FIXED = ("first", "middle", "all")


@dataclass(frozen=True)
class Part:
    """Frames `[start, stop)` that look at the frames `[keys_start, keys_stop)`: `shared`, all at all of these; or one by one.

    `keys_start` counts among the frames whose keys there are.
    """

    start: int
    stop: int
    keys_start: int
    keys_stop: int
    shared: bool


def split_by_name(
    attention: Sequence[str], sources: Sequence[tuple[int, ...]], seen: Sequence[int]
) -> list[list[Part]]:
    """The parts of attention, grouped by the names in `attention`; the first group covers every frame.

    A frame that looks at one other frame only, by whatever names, is in the first group alone.

    Args:
        sources: for each frame the frames it looks at, `tav_model.networks.attention.key_frames`.
        seen: the frames whose keys there are, in order.
    """
    f = len(sources)
    slot = {frame: position for position, frame in enumerate(seen)}
    shift = {"former": -1, "self": 0, "next": 1}
    groups = []
    for place, name in enumerate(attention):
        frames = [i for i in range(f) if place == 0 or len(set(sources[i])) > 1]
        group: list[Part] = []
        for i in frames:
            if name in FIXED:
                first, last = {"first": (0, 0), "middle": (f // 2, f // 2), "all": (0, f - 1)}[name]
                one = Part(i, i + 1, slot[first], slot[last] + 1, shared=True)
            else:
                key = slot[min(max(i + shift[name], 0), f - 1)]
                one = Part(i, i + 1, key, key + 1, shared=False)
            group[-1:] = _joined(group[-1], one) if group else [one]
        groups.append(group)
    return groups


def _joined(before: Part, one: Part) -> list[Part]:
    """The two as one part, where that is the same."""
    keys = (one.keys_start, one.keys_stop)
    follows = before.stop == one.start and (
        (before.keys_start, before.keys_stop) == keys if one.shared else before.keys_stop == one.keys_start
    )
    if not follows:
        return [before, one]
    return [Part(before.start, one.stop, before.keys_start, one.keys_stop, one.shared)]


def merged_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: Sequence[Sequence[Part]]
) -> torch.Tensor:
    """`b f heads n d`, keys and values of the seen frames `b s heads n d` -> `b f heads n d`, by the parts' merged softmax."""
    return _MergedAttention.apply(query, key, value, groups)


class _MergedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: Sequence[Sequence[Part]]
    ) -> torch.Tensor:
        out = _like_tokens(query)
        b, f, heads, n, _ = query.shape
        precise = torch.promote_types(query.dtype, torch.float32)
        total = rearrange(torch.empty(b, heads, f, n, dtype=precise), "b heads f n -> b f heads n")
        for place, group in enumerate(groups):
            for part in group:
                for (q, o, t), (k, v) in _calls(part, (query, out, total), (key, value)):
                    ours, log = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
                    if place == 0:
                        o.copy_(ours)
                        t.copy_(log)
                    else:
                        joint = torch.logaddexp(t, log)
                        share = torch.exp(log - joint)[..., None]
                        o.copy_(torch.lerp(o.to(precise), ours.to(precise), share))
                        t.copy_(joint)
        ctx.save_for_backward(query, key, value, out, total)
        ctx.groups = groups
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, total = ctx.saved_tensors
        grads = [_like_tokens(query), _like_tokens(key).zero_(), _like_tokens(value).zero_()]
        grad_query, grad_key, grad_value = grads
        for place, group in enumerate(ctx.groups):
            for part in group:
                views = _calls(part, (grad_out, query, out, total, grad_query), (key, value, grad_key, grad_value))
                for (g, q, o, t, to_query), (k, v, to_key, to_value) in views:
                    of_query, of_key, of_value = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                        g, q, k, v, o, t, 0.0, False
                    )
                    if place == 0:
                        to_query.copy_(of_query)
                    else:
                        to_query.add_(of_query)
                    to_key.add_(of_key)
                    to_value.add_(of_value)
        return (*grads, None)


def _like_tokens(heads: torch.Tensor) -> torch.Tensor:
    """An empty tensor of this shape, `b f heads n d`, in the memory order of tokens: the heads join without a copy."""
    b, f, heads_number, n, d = heads.shape
    return rearrange(heads.new_empty(b, f, n, heads_number, d), "b f n heads d -> b f heads n d")


def _calls(
    part: Part, of_queries: Sequence[torch.Tensor], of_keys: Sequence[torch.Tensor]
) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Views of one call's share, `batch heads n ...`: those `b f heads n ...` of the queries, those of the keys."""
    frames, keys = slice(part.start, part.stop), slice(part.keys_start, part.keys_stop)
    if part.shared:
        yield (
            [x[:, frames].movedim(1, 2).flatten(2, 3) for x in of_queries],
            [x[:, keys].movedim(1, 2).flatten(2, 3) for x in of_keys],
        )
    else:
        # Videos and frames are one dimension only where all frames take part.
        for video in range(of_queries[0].shape[0]):
            yield [x[video, frames] for x in of_queries], [x[video, keys] for x in of_keys]
