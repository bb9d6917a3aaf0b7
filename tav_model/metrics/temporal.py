"""How steady a video is, measured on its pixels alone: flicker, and warping error along the source's motion.

Both read frames as ``f h w c`` uint8 RGB and speak of values in [0, 1]. Neither needs a model.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tav_model.errors import TavError

SMALLEST_SIDE = 12  # pixels; the coarsest level of the flow estimate has no room below it


class Motion(NamedTuple):
    """Where each pixel of a video goes from one frame to the next.

    Attributes:
        flow: ``(f-1) h w 2`` float32 pixels; what is at ``(x, y)`` in frame t is at ``(x, y) + flow[t, y, x]``
            in frame t+1.
        visible: ``(f-1) h w`` bool; the pixel of frame t is seen in frame t+1, so that its flow can be trusted.
    """

    flow: np.ndarray
    visible: np.ndarray


def check_frames(frames: np.ndarray) -> None:
    """Raise `TavError` unless ``frames`` are ``f h w 3`` uint8 with at least one frame."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise TavError(f"frames: {frames.dtype} of shape {frames.shape}; allowed are f h w c, uint8, 3 channels")


def flicker(frames: np.ndarray) -> float:
    """Mean absolute change of luma (ITU-R BT.601, in [0, 1]) from one frame to the next, over all pixels.

    Motion changes pixels too, so a number says little alone: the excess of an edit over its source, which moves
    the same way, is what the edit added. A single frame has no flicker: 0.
    """
    import cv2

    check_frames(frames)
    if len(frames) == 1:
        return 0.0
    luma = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]).astype(np.float32)
    return float(np.abs(np.diff(luma, axis=0)).mean(dtype=np.float64) / 255)


def estimate_motion(frames: np.ndarray) -> Motion:
    """The motion of a video ``f h w c``, by dense inverse search (Kroeger et al., ECCV 2016, arXiv 1603.03590).

    Raises:
        TavError: frames of another kind, or smaller than 12x12 where there is more than one.
    """
    import cv2

    check_frames(frames)
    count, height, width, _ = frames.shape
    flow = np.zeros((count - 1, height, width, 2), np.float32)
    visible = np.zeros((count - 1, height, width), bool)
    if count > 1 and min(height, width) < SMALLEST_SIDE:
        raise TavError(f"frames: {width}x{height}; optical flow needs {SMALLEST_SIDE}x{SMALLEST_SIDE} or more")

    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    search.setFinestScale(0)  # the preset stops at half the size
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    for t in range(count - 1):
        flow[t] = _flow(search, gray[t], gray[t + 1])
        visible[t] = visible_pixels(flow[t], _flow(search, gray[t + 1], gray[t]))
    return Motion(flow, visible)


def _flow(search: Any, image: np.ndarray, following: np.ndarray) -> np.ndarray:
    return search.calc(image, following, None)


def visible_pixels(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """Which pixels of frame t are seen in frame t+1, h w, from the flow there and the flow back, each ``h w 2``.

    Those whose flow w = (u, v) stays inside the frame, from where it leads the flow back w' returns,
    ``|w + w'|^2 <= 0.01 (|w|^2 + |w'|^2) + 0.5``, and which lie on no motion boundary,
    ``|grad u|^2 + |grad v|^2 <= 0.01 |w|^2 + 0.002`` (Sundaram et al., ECCV 2010; Lai et al. check the same).
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

    Frame t+1 is warped back to frame t along ``motion``, which comes from the source video: an edit that keeps
    the source's motion and paints each thing the same in every frame has an error near 0. The error of a pair of
    frames is the mean squared difference over the visible pixels and the channels, values in [0, 1] (as in the
    paper's code; its equation sums over the channels instead); that of the video is the mean over its pairs.

    Pairs with no visible pixel (a cut) are left out; with no pair left, as in a single frame, the error is 0.

    Raises:
        TavError: frames of another kind, or not as many or not as large as those ``motion`` was estimated on.
    """
    check_frames(frames)
    if (len(frames) - 1, *frames.shape[1:3]) != motion.visible.shape:
        pairs, height, width = motion.visible.shape
        raise TavError(
            f"frames: {len(frames)} of {frames.shape[2]}x{frames.shape[1]}, "
            f"but the source has {pairs + 1} of {width}x{height}; they must agree"
        )
    values = frames.astype(np.float32) / 255
    errors = [
        np.mean((_warp(after, flow) - before)[visible] ** 2, dtype=np.float64)
        for before, after, flow, visible in zip(values[:-1], values[1:], *motion, strict=True)
        if visible.any()
    ]
    return float(np.mean(errors)) if errors else 0.0


def _target(flow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where ``flow`` (h w 2) leads from each pixel: x and y, each h w."""
    y, x = np.indices(flow.shape[:2], dtype=np.float32)
    return x + flow[..., 0], y + flow[..., 1]


def _warp(image: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """``image`` (h w c) read where ``flow`` leads, bilinearly; outside, the nearest pixel of the border."""
    import cv2

    return cv2.remap(image, *_target(flow), cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
