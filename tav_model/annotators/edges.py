"""Edges and lines of frames by OpenCV: conditions that need no weights."""

from __future__ import annotations

import numpy as np

# Line art: the blur in pixels that a line is darker than, for pictures whose shorter side has 512 pixels, as the
# published networks were trained; intensities below which there is no line; and the least that counts as a full line.
BLUR, FAINT, FULL = 6.0, 8.0, 16.0


def canny(frames: np.ndarray, low: float = 100, high: float = 200) -> np.ndarray:
    """Return the edges of each frame, white on black (Canny, 1986), as `f h w 3` in uint8.

    Args:
        frames: `f h w 3` in uint8.
        low: gradient that continues an edge.
        high: gradient that starts an edge.
    """
    import cv2

    return _three_channels(np.stack([cv2.Canny(np.ascontiguousarray(frame), low, high) for frame in frames]))


def lineart(frames: np.ndarray) -> np.ndarray:
    """Return what is darker than its surroundings as white lines on black, `f h w 3` in uint8.

    This is the `standard` line art that ControlNet 1.1 is used with: the least difference of the three channels to the
    frame's Gaussian blur, scaled so that the median of all lines is half white. Here the median is that of all frames,
    so that the lines do not flicker.

    Args:
        frames: `f h w 3` in uint8.
    """
    import cv2

    sigma = BLUR * min(frames.shape[1:3]) / 512
    darker = []
    for frame in frames:
        picture = frame.astype(np.float32)
        darker.append((cv2.GaussianBlur(picture, (0, 0), max(sigma, 1.0)) - picture).min(-1).clip(0, 255))
    intensity = np.stack(darker)
    lines = intensity[intensity > FAINT]
    full = max(FULL, float(np.median(lines)) if lines.size else FULL)
    return _three_channels((intensity * (127 / full)).clip(0, 255).astype(np.uint8))


def _three_channels(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=-1)
