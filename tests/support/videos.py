"""A moving square, and the parameters that decode it."""

from __future__ import annotations

import numpy as np

from tav.config import DecodeParams


def decode(**changes) -> DecodeParams:
    return DecodeParams(**{"frames": 6, "width": 64, "height": 64} | changes)


def moving_square(frames: int = 6, height: int = 64, width: int = 96) -> np.ndarray:
    """A bright square on a gradient, further right in each frame."""
    video = np.zeros((frames, height, width, 3), np.uint8)
    video[..., 2] = np.linspace(40, 160, width).astype(np.uint8)
    for i, frame in enumerate(video):
        frame[20:36, 8 + 8 * i : 24 + 8 * i] = (230, 120, 30)
    return video
