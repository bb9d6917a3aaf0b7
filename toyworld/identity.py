"""Measure whether an object keeps what no caption names: its pattern, from frame to frame."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from toyworld.backdrops import SIDE
from toyworld.renderer import render_with_mask
from toyworld.samples import random_identity
from toyworld.scenes import Pose, Scene

# Points of the object that are compared, along each side of the square around it.
POINTS = 32
# Blur before the comparison, as a standard deviation in pixels: pixel art has steps of four pixels, which do not turn with
# the object.
BLUR = 2.0
# A point belongs to the object if the object covers this share of the pixel.
COVERED = 0.95
# Rounds of random identities that the distance is divided by the mean of.
ROUNDS = 2


def identity_error(frames: np.ndarray, truth: Scene, times: Sequence[float]) -> float:
    """Return how much the object's appearance differs between frames, relative to objects of random identities.

    The object is aligned by its true pose. The distance of two frames is the mean squared difference of the colours at the
    points that the true object covers in both. The mean over all pairs of frames is divided by that of rendered frames with
    the same poses, in each of which the object has another pattern, accent, phase and slant.

    Args:
        frames: `f h w c` in uint8, 128x128.
        truth: scene of the ground truth.
        times: time of each frame, 0 to 1.

    Returns:
        About 0 if the object is the same in all frames, about 1 if it is another one in each frame. It is not exactly 0 for
        rendered frames, as the light does not turn with the object.
    """
    rng = np.random.default_rng(0)
    poses = [truth.pose(time) for time in times]
    masks = [render_with_mask(truth, time)[1] for time in times]
    covered = np.stack(
        [_aligned(mask[..., None], pose)[..., 0] > COVERED for mask, pose in zip(masks, poses, strict=True)]
    )
    random = []
    for _ in range(ROUNDS):
        others = [dataclasses.replace(truth, **random_identity(rng)) for _ in times]
        random.append([render_with_mask(other, time)[0] for other, time in zip(others, times, strict=True)])
    scale = sum(_distance(np.stack(rows), poses, covered) for rows in random) / ROUNDS
    return _distance(frames, poses, covered) / max(scale, 1e-12)


def _distance(frames: np.ndarray, poses: Sequence[Pose], covered: np.ndarray) -> float:
    """Return the mean squared difference of the aligned objects over all pairs of frames."""
    import cv2

    blurred = [cv2.GaussianBlur(frame.astype(np.float32), (0, 0), BLUR) for frame in frames]
    aligned = [_aligned(frame, pose) for frame, pose in zip(blurred, poses, strict=True)]
    distances = []
    for i in range(len(frames)):
        for j in range(i):
            common = covered[i] & covered[j]
            if common.any():
                distances.append(np.square(aligned[i][common] - aligned[j][common]).mean())
    return float(np.mean(distances)) if distances else 0.0


def _aligned(picture: np.ndarray, pose: Pose) -> np.ndarray:
    """Return the object as if it were upright and filled the square, (POINTS, POINTS, c); 0 outside of the picture."""
    import cv2

    steps = np.linspace(-1.1, 1.1, POINTS, dtype=np.float32)
    u, v = np.meshgrid(steps, steps)
    cos, sin = np.cos(pose.rotation), np.sin(pose.rotation)
    x = (pose.x + pose.radius * (u * cos - v * sin)) * SIDE - 0.5
    y = (pose.y + pose.radius * (u * sin + v * cos)) * SIDE - 0.5
    sampled = cv2.remap(picture, x.astype(np.float32), y.astype(np.float32), cv2.INTER_LINEAR)
    return sampled.reshape(POINTS, POINTS, -1)
