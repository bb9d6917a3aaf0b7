"""Temporal metrics of a video by its pixels: flicker, and the warping error along the source's motion.

Frames are ``f h w c`` uint8 RGB; errors refer to values in [0, 1]. No model is needed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tav_model.errors import TavError

SMALLEST_SIDE = 12  # pixels; smaller frames do not fit the coarsest level of the flow estimate


class Motion(NamedTuple):
    """The motion of each pixel of a video from one frame to the next.

    Attributes:
        flow: ``(f-1) h w 2`` float32, in pixels: the point ``(x, y)`` of frame t moves to ``(x, y) + flow[t, y, x]``
            in frame t+1.
        visible: ``(f-1) h w`` bool: the pixel of frame t is visible in frame t+1, so that its flow is reliable.
    """

    flow: np.ndarray
    visible: np.ndarray


def check_frames(frames: np.ndarray) -> None:
    """Raise `TavError` unless ``frames`` are ``f h w 3`` uint8 with at least one frame."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise TavError(f"frames: {frames.dtype} of shape {frames.shape}; allowed are f h w c, uint8, 3 channels")


def flicker(frames: np.ndarray) -> float:
    """Mean absolute change of luma (ITU-R BT.601, in [0, 1]) from one frame to the next, over all pixels.

    Motion changes pixels too, so compare the flicker of an edit with that of its source, which has the same motion. For a
    single frame it is 0.
    """
    import cv2

    check_frames(frames)
    if len(frames) == 1:
        return 0.0
    luma = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]).astype(np.float32)
    return float(np.abs(np.diff(luma, axis=0)).mean(dtype=np.float64) / 255)


def estimate_motion(frames: np.ndarray) -> Motion:
    """Estimate the motion of a video ``f h w c`` by dense inverse search (Kroeger et al., arXiv 1603.03590).

    Raises:
        TavError: frames of another type or shape, or several that are smaller than 12x12.
    """
    import cv2

    check_frames(frames)
    count, height, width, _ = frames.shape
    flow = np.zeros((count - 1, height, width, 2), np.float32)
    visible = np.zeros((count - 1, height, width), bool)
    if count > 1 and min(height, width) < SMALLEST_SIDE:
        raise TavError(f"frames: {width}x{height}; optical flow needs {SMALLEST_SIDE}x{SMALLEST_SIDE} or more")

    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    search.setFinestScale(0)  # the preset stops at half the resolution
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    for t in range(count - 1):
        flow[t] = _flow(search, gray[t], gray[t + 1])
        visible[t] = visible_pixels(flow[t], _flow(search, gray[t + 1], gray[t]))
    return Motion(flow, visible)


def _flow(search: Any, image: np.ndarray, following: np.ndarray) -> np.ndarray:
    return search.calc(image, following, None)


def visible_pixels(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """Return which pixels of frame t are visible in frame t+1, h w, given the flow there and back, each ``h w 2``.

    A pixel is visible if its flow w = (u, v) stays inside the frame; if the flow back w' at its end point returns,
    ``|w + w'|^2 <= 0.01 (|w|^2 + |w'|^2) + 0.5``; and if it does not lie on a motion boundary,
    ``|grad u|^2 + |grad v|^2 <= 0.01 |w|^2 + 0.002`` (Sundaram et al., ECCV 2010, and Lai et al.).
    """
    height, width, _ = forward.shape
    x, y = _target(forward)
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)

    back = _warp(backward, forward)
    length = (forward**2).sum(-1)
    returns = ((forward + back) ** 2).sum(-1) <= 0.01 * (length + (back**2).sum(-1)) + 0.5

    along_y, along_x = np.gradient(forward, axis=(0, 1))
    smooth = (along_x**2 + along_y**2).sum(-1) <= 0.01 * length + 0.002
    return inside & returns & smooth


def warping_error(frames: np.ndarray, motion: Motion) -> float:
    """Warping error of Lai et al. (ECCV 2018, "Learning Blind Video Temporal Consistency").

    Frame t+1 is warped back to frame t along ``motion``, which is that of the source video. An edit that keeps the
    source's motion and renders every object alike in all frames has an error near 0. The error of a pair of frames is
    the mean squared difference over visible pixels and channels, of values in [0, 1] (as in the paper's code; its
    equation sums over the channels). The error of the video is the mean over its pairs of frames.

    Pairs without a visible pixel (a cut) are left out. If no pair is left, as for a single frame, the error is 0.

    Raises:
        TavError: frames of another type or shape, or other in number or size than those of ``motion``.
    """
    check_frames(frames)
    if (len(frames) - 1, *frames.shape[1:3]) != motion.visible.shape:
        pairs, height, width = motion.visible.shape
        raise TavError(
            f"frames: {len(frames)} of {frames.shape[2]}x{frames.shape[1]}, "
            f"but the source has {pairs + 1} of {width}x{height}; they must agree"
        )
    errors = warping_errors(frames, motion)
    return float(np.mean(errors)) if errors else 0.0


def warping_errors(frames: np.ndarray, motion: Motion) -> list[float]:
    """Return the errors whose mean is `warping_error`: of each pair of frames with visible pixels."""
    values = frames.astype(np.float32) / 255
    return [
        np.mean((_warp(after, flow) - before)[visible] ** 2, dtype=np.float64)
        for before, after, flow, visible in zip(values[:-1], values[1:], *motion, strict=True)
        if visible.any()
    ]


def grid_points(height: int, width: int, spacing: int = 8) -> np.ndarray:
    """Return the points ``(x, y)`` of a grid of so many pixels, ``n 2``, which `follow` begins with."""
    y, x = np.meshgrid(*(np.arange(spacing // 2, side, spacing) for side in (height, width)), indexing="ij")
    return np.stack([x.ravel(), y.ravel()], axis=-1).astype(np.float32)


def follow(motion: Motion, spacing: int = 8, start: np.ndarray | None = None) -> np.ndarray:
    """Follow the points of a grid in the first frame along the motion.

    Args:
        motion: of the video.
        spacing: pixels between neighbouring points.
        start: positions in the first frame, ``n 2``, in place of the grid: where an earlier part of the video has led to.

    Returns:
        The positions ``(x, y)`` in every frame, ``f n 2``; points that leave the frame stay at its border.
    """
    _, height, width = motion.visible.shape
    positions = [grid_points(height, width, spacing) if start is None else start]
    for flow in motion.flow:
        last = positions[-1]
        moved = last + _sample(flow, last)
        positions.append(moved.clip(0, np.array([width - 1, height - 1], np.float32)))
    return np.stack(positions)


def _sample(flow: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return ``flow`` (h w 2) at ``points`` (n 2), bilinearly."""
    import cv2

    x, y = (np.ascontiguousarray(points[:, None, i]) for i in (0, 1))
    return cv2.remap(flow, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)[:, 0]


def _target(flow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the end point of ``flow`` (h w 2) for each pixel: x and y, each h w."""
    y, x = np.indices(flow.shape[:2], dtype=np.float32)
    return x + flow[..., 0], y + flow[..., 1]


def _warp(image: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """Sample ``image`` (h w c) at the end points of ``flow``, bilinearly; outside, the nearest pixel of the border."""
    import cv2

    return cv2.remap(image, *_target(flow), cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
