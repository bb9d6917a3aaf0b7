"""Compute long clips some frames at a time, where every element depends on those at its own place only.

What is computed in between is then as large as a slice, whatever the length of the clip. The results are bit-identical.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

FRAMES = 64
"""Frames of a slice."""


def by_frames(function: Callable[..., torch.Tensor], first: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """Return `function(first, *others)`, computed slice by slice for more than `FRAMES` frames.

    Args:
        function: computes each element of its result, of the shape of `first`, from those at the same place.
        first: `b c f h w`. The result of a long clip takes its place: its values are lost.
        others: tensors of as many frames.
    """
    num_frames = first.shape[2]
    if num_frames <= FRAMES:
        return function(first, *others)
    for start in range(0, num_frames, FRAMES):
        part = slice(start, start + FRAMES)
        first[:, :, part] = function(first[:, :, part], *(one[:, :, part] for one in others))
    return first
