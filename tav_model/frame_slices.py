"""Compute long clips some frames at a time, where every element depends on those at its own place only.

What is computed in between is then as large as a slice, whatever the length of the clip. The results are bit-identical.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

FRAMES = 64
"""Frames of a slice."""


def by_frames(
    function: Callable[..., torch.Tensor], *tensors: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return `function(*tensors)`, computed slice by slice for more than `FRAMES` frames.

    Args:
        function: computes each element of its result, of the shape and type of the first tensor, from those at the same place.
        tensors: `b c f h w`.
        out: where the result of a long clip is written to; it may be one of the tensors, whose values are then lost.
    """
    num_frames = tensors[0].shape[2]
    if num_frames <= FRAMES:
        return function(*tensors)
    result = torch.empty_like(tensors[0]) if out is None else out
    for start in range(0, num_frames, FRAMES):
        part = slice(start, start + FRAMES)
        result[:, :, part] = function(*(one[:, :, part] for one in tensors))
    return result
