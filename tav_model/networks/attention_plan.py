"""Which frames each frame of a video attends to: from names such as `first` and `former` to frame numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from math import gcd

# The frames that a name stands for, given a frame and the number of frames. At the ends of the video, `former` and
# `next` are the frame itself.
_FRAMES: Mapping[str, Callable[[int, int], range]] = {
    "first": lambda frame, num_frames: range(1),
    "former": lambda frame, num_frames: _one(max(frame - 1, 0)),
    "self": lambda frame, num_frames: _one(frame),
    "middle": lambda frame, num_frames: _one(num_frames // 2),
    "next": lambda frame, num_frames: _one(min(frame + 1, num_frames - 1)),
    "all": lambda frame, num_frames: range(num_frames),
}
_SAME_FOR_EVERY_FRAME = ("first", "middle", "all")

ATTENTION_FRAMES = tuple(_FRAMES)
"""The names that are allowed."""

TUNE_A_VIDEO = ("first", "former")
"""The choice of Tune-A-Video (arXiv 2212.11565, equation 3)."""


def _one(frame: int) -> range:
    return range(frame, frame + 1)


def check_attention_frames(attention: Sequence[str]) -> tuple[str, ...]:
    """Return the names as a tuple.

    Raises:
        ValueError: there are none, or one that is not in `ATTENTION_FRAMES`.
    """
    unknown = [name for name in attention if name not in ATTENTION_FRAMES]
    if isinstance(attention, str) or unknown or not attention:
        raise ValueError(f"attention: {attention!r} must be a list of one or more of {', '.join(ATTENTION_FRAMES)}")
    return tuple(attention)


def key_frames(attention: Sequence[str], num_frames: int) -> list[tuple[int, ...]]:
    """Return, for each frame, the frames that its keys and values come from, in the order of concatenation.

    Where every frame of such a list occurs equally often, it is listed once: the softmax over `[k ; k]` weighs the
    values as the one over `k` does. In Tune-A-Video this is so for the first two frames, whose former frame is the
    first one.
    """
    sources = []
    for frame in range(num_frames):
        named = [source for name in attention for source in _FRAMES[name](frame, num_frames)]
        counts = {source: named.count(source) for source in named}
        common = reduce(gcd, counts.values())
        sources.append(tuple(source for source, count in counts.items() for _ in range(count // common)))
    return sources


@dataclass(frozen=True)
class AttentionBlock:
    """Frames `[start, stop)` that attend to the keys of frames `[keys_start, keys_stop)`.

    Either all of them to all of these, or, if `diagonal`, the first to the first, the second to the second, and so on.
    The keys are counted among `AttentionPlan.projected`.
    """

    start: int
    stop: int
    keys_start: int
    keys_stop: int
    diagonal: bool


@dataclass(frozen=True)
class AttentionPlan:
    """Which frames' keys and values each frame of a video attends to, in the forms that the computations need.

    Attributes:
        projected: the frames that some frame attends to, ascending: those whose keys and values are computed.
        sources: for each frame, the positions in `projected` of the frames it attends to, in the order of concatenation.
        equal_lengths: the same, grouped by the number of sources: `(frames, their sources)`.
        blocks: the same as blocks of the attention matrix, one group of blocks for each name. The first group covers
            every frame; a frame that attends to a single frame, by whatever names, is in the first group only.
        own_frame_only: whether each frame attends to nothing but itself.
    """

    projected: tuple[int, ...]
    sources: tuple[tuple[int, ...], ...]
    equal_lengths: tuple[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]], ...]
    blocks: tuple[tuple[AttentionBlock, ...], ...]
    own_frame_only: bool


@lru_cache(maxsize=256)
def attention_plan(attention: tuple[str, ...], num_frames: int) -> AttentionPlan:
    """Return the plan for a video of `num_frames` frames."""
    frames = key_frames(attention, num_frames)
    projected = sorted({source for sources in frames for source in sources})
    position = {frame: i for i, frame in enumerate(projected)}
    sources = tuple(tuple(position[source] for source in sources) for sources in frames)
    by_length: dict[int, list[int]] = {}
    for frame, its_sources in enumerate(sources):
        by_length.setdefault(len(its_sources), []).append(frame)
    return AttentionPlan(
        projected=tuple(projected),
        sources=sources,
        equal_lengths=tuple((tuple(group), tuple(sources[frame] for frame in group)) for group in by_length.values()),
        blocks=tuple(
            _blocks(
                name, [i for i in range(num_frames) if place == 0 or len(set(sources[i])) > 1], num_frames, position
            )
            for place, name in enumerate(attention)
        ),
        own_frame_only=attention == ("self",),
    )


def _blocks(
    name: str, frames: Sequence[int], num_frames: int, position: Mapping[int, int]
) -> tuple[AttentionBlock, ...]:
    """Return the blocks in which `frames` attend to the frames called `name`; neighbouring blocks are joined."""
    diagonal = name not in _SAME_FOR_EVERY_FRAME
    blocks: list[AttentionBlock] = []
    for frame in frames:
        sources = _FRAMES[name](frame, num_frames)
        block = AttentionBlock(frame, frame + 1, position[sources[0]], position[sources[-1]] + 1, diagonal)
        if blocks and _continues(blocks[-1], block):
            before = blocks.pop()
            block = AttentionBlock(before.start, block.stop, before.keys_start, block.keys_stop, diagonal)
        blocks.append(block)
    return tuple(blocks)


def _continues(before: AttentionBlock, block: AttentionBlock) -> bool:
    """Return whether two blocks of the same name can be joined."""
    if block.diagonal:
        return (before.stop, before.keys_stop) == (block.start, block.keys_start)
    return before.stop == block.start
