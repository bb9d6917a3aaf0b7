"""Scaled dot-product attention, `softmax(Q K^T / sqrt(d)) V`: over one sequence, and across the frames of a video."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch.nn.functional import scaled_dot_product_attention

from tav_model.networks import cpu_kernels
from tav_model.networks.attention_plan import AttentionPlan
from tav_model.networks.split_key_attention import split_key_attention

# Up to so many keys, plain products are faster on a CPU than torch's fused attention, which spends more on each sequence
# than the products take. The temporal attention has as many keys as there are frames.
FEW_KEYS = 32


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, upcast: bool = False) -> torch.Tensor:
    """Return attention over one sequence, `b heads n d`.

    Args:
        query: `b heads n d`.
        key: `b heads m d`.
        value: `b heads m d`.
        upcast: compute in float32, which Stable Diffusion 2.1 needs in half precision.
    """
    if upcast:
        with torch.autocast(query.device.type, enabled=False):
            return scaled_dot_product_attention(query.float(), key.float(), value.float()).to(value.dtype)
    if query.device.type == "cpu" and key.shape[-2] <= FEW_KEYS:
        scores = (query * query.shape[-1] ** -0.5) @ key.mT
        return scores.softmax(dim=-1) @ value
    return scaled_dot_product_attention(query, key, value)


def attend_to_frames(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan, upcast: bool = False
) -> torch.Tensor:
    """Return the attention of every frame to the frames that `plan` lists for it, `b f heads n d`.

    Args:
        query: `b f heads n d`.
        key: `b k heads n d`, of the k frames `plan.projected`.
        value: as `key`.
        plan: see `AttentionPlan`.
        upcast: see `attend`.
    """
    if plan.own_frame_only:
        return _attend_to_own_frame(query, key, value, upcast)
    if splits_keys(query, upcast):
        return split_key_attention(query, key, value, plan.blocks)
    if len(set(plan.sources)) == 1:
        return _attend_to_shared_frames(query, key, value, plan, upcast)
    return _attend_to_copied_frames(query, key, value, plan, upcast)


def splits_keys(query: torch.Tensor, upcast: bool) -> bool:
    """Return whether frames are attended to one after the other, without copying their keys and values together.

    On a GPU, copying takes a thousandth of the time, and fused attention over the concatenated keys is faster.
    """
    return query.device.type == "cpu" and cpu_kernels.available() and (not upcast or query.dtype == torch.float32)


def _attend_to_own_frame(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, upcast: bool) -> torch.Tensor:
    q, k, v = (rearrange(x, "b f heads n d -> (b f) heads n d") for x in (query, key, value))
    out = attend(q, k, v, upcast)
    return rearrange(out, "(b f) heads n d -> b f heads n d", b=query.shape[0])


def _attend_to_shared_frames(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan, upcast: bool
) -> torch.Tensor:
    """Attend from all frames, as one sequence, to the same keys."""
    shared = plan.sources[0]
    out = attend(
        rearrange(query, "b f heads n d -> b heads (f n) d"),
        rearrange(select_frames(key, shared), "b k heads n d -> b heads (k n) d"),
        rearrange(select_frames(value, shared), "b k heads n d -> b heads (k n) d"),
        upcast,
    )
    return rearrange(out, "b heads (f n) d -> b f heads n d", f=query.shape[1])


def _attend_to_copied_frames(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan, upcast: bool
) -> torch.Tensor:
    """Attend from each frame to its own copy of the keys; frames with equally many keys form one batch."""
    order: list[int] = []
    parts = []
    for frames, sources in plan.equal_lengths:
        part = attend(
            select_frames(query, frames).flatten(0, 1),
            _joined_frames(key, sources).flatten(0, 1),
            _joined_frames(value, sources).flatten(0, 1),
            upcast,
        )
        order += frames
        parts.append(rearrange(part, "(b f) heads n d -> b f heads n d", f=len(frames)))
    out = torch.cat(parts, dim=1)
    return select_frames(out, sorted(range(len(order)), key=order.__getitem__))


def _joined_frames(tokens: torch.Tensor, sources: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the tokens of each list of equally many frames as one sequence, `b k heads n d` -> `b f heads (s n) d`."""
    return torch.cat([select_frames(tokens, column) for column in zip(*sources, strict=True)], dim=-2)


def select_frames(tokens: torch.Tensor, frames: Sequence[int]) -> torch.Tensor:
    """Return the chosen frames of `b k ...`; as a view where they are consecutive, or the same one again and again.

    Slices take the place of an index, which would be copied to a GPU in every call. That would keep the call out of a CUDA
    graph, and an index is slow in the backward pass.
    """
    runs: list[tuple[int, int, int]] = []  # first frame, how many, and the step from each to the next: 0 or 1
    for frame in frames:
        first, count, step = runs[-1] if runs else (frame, 0, 0)
        if count == 1 and frame - first in (0, 1):
            runs[-1] = first, 2, frame - first
        elif count > 1 and frame == first + step * count:
            runs[-1] = first, count + 1, step
        else:
            runs.append((frame, 1, 1))
    parts = [
        tokens[:, first : first + count] if step else tokens[:, first : first + 1].expand(-1, count, *tokens.shape[2:])
        for first, count, step in runs
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
