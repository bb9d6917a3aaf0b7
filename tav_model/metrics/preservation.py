"""Metrics of what an edit keeps: pixels that should stay, and the motion of the source.

Frames are ``f h w c`` uint8 RGB. No model is needed.
"""

from __future__ import annotations

import numpy as np

from tav_model.errors import TavError
from tav_model.metrics.temporal import Motion, check_frames, follow

WINDOW = 11  # pixels; with the deviation and the two constants, those of Wang et al.
DEVIATION = 1.5
K1, K2 = 0.01, 0.03
HIGHEST_PSNR = 100.0  # decibels, for equal frames
STILL = 0.25  # pixels from one frame to the next; slower points stand still


def psnr(frames: np.ndarray, source: np.ndarray, kept: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in decibels, ``-10 log10(mean squared error)`` of values in [0, 1].

    At most 100, also for equal frames.

    Args:
        frames: the edit.
        source: what it is compared with.
        kept: ``f h w`` bool, the pixels that count; by default all.

    Raises:
        TavError: shapes that do not agree, or no pixel that counts.
    """
    kept = _check(frames, source, kept)
    error = np.square((frames.astype(np.float64) - source) / 255)[kept].mean()
    return float(min(HIGHEST_PSNR, -10 * np.log10(max(error, 1e-12))))


def ssim(frames: np.ndarray, source: np.ndarray, kept: np.ndarray | None = None) -> float:
    """Structural similarity (Wang et al., IEEE TIP 2004), the mean over channels and pixels; 1 for equal frames.

    Local means, variances and covariance are weighted by a Gaussian of 11x11 pixels with deviation 1.5.

    Args:
        frames: the edit.
        source: what it is compared with.
        kept: ``f h w`` bool, the pixels that count; by default all. Where there are any whose window lies within `kept`,
            only these do, so that what is around has no influence.

    Raises:
        TavError: shapes that do not agree, or no pixel that counts.
    """
    import cv2

    kept = _check(frames, source, kept)
    inner = np.stack([cv2.erode(one.astype(np.uint8), np.ones((WINDOW, WINDOW)), borderValue=1) for one in kept]) > 0
    chosen = inner if inner.any() else kept

    def blur(image: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(image, (WINDOW, WINDOW), DEVIATION, borderType=cv2.BORDER_REFLECT)

    total = 0.0
    for x, y, pixels in zip(frames.astype(np.float64) / 255, source.astype(np.float64) / 255, chosen, strict=True):
        mean_x, mean_y = blur(x), blur(y)
        variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
        covariance = blur(x * y) - mean_x * mean_y
        luminance = (2 * mean_x * mean_y + K1**2) / (mean_x**2 + mean_y**2 + K1**2)
        total += (luminance * (2 * covariance + K2**2) / (variance_x + variance_y + K2**2))[pixels].sum()
    return float(total / chosen.sum() / frames.shape[-1])


def motion_fidelity(motion: Motion, source: Motion, spacing: int = 8) -> float:
    """Motion fidelity (Yatim et al., CVPR 2024, arXiv 2311.17009, equation 11), from -1 to 1.

    Points are followed through both videos. For each, the most similar course in the other video is found; similarity is
    the mean cosine between displacements from frame to frame. The metric is the mean over the points of the edit plus that
    over the points of the source, halved. The paper follows points by CoTracker; here they follow the optical flow.

    Where neither point moves, the cosine counts as 1, where one of them does, as 0. Without motion (a single frame), it is 1.

    Args:
        motion: of the edit.
        source: of the source.
        spacing: pixels between the points of the first frame.

    Raises:
        TavError: videos of different lengths.
    """
    if len(motion.flow) != len(source.flow):
        raise TavError(f"motion: of {len(motion.flow) + 1} frames, but that of the source has {len(source.flow) + 1}")
    if not len(motion.flow):
        return 1.0
    similarity = _cosines(*(np.diff(follow(one, spacing), axis=0) for one in (motion, source)))
    return float((similarity.max(axis=1).mean() + similarity.max(axis=0).mean()) / 2)


def _cosines(edit: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Return the mean cosines between courses, m n, for displacements ``f m 2`` and ``f n 2``."""
    lengths = [np.linalg.norm(steps, axis=-1) for steps in (edit, source)]
    moves = [length > STILL for length in lengths]
    units = [
        np.where(move[..., None], steps / np.maximum(length, 1e-9)[..., None], 0)
        for steps, length, move in zip((edit, source), lengths, moves, strict=True)
    ]
    cosines = np.einsum("fmi,fni->mn", *units)
    both_still = np.einsum("fm,fn->mn", *((~move).astype(np.float64) for move in moves))
    return (cosines + both_still) / len(edit)


def _check(frames: np.ndarray, source: np.ndarray, kept: np.ndarray | None) -> np.ndarray:
    check_frames(frames)
    if frames.shape != source.shape:
        raise TavError(f"frames: {frames.shape}, but the source has {source.shape}; they must agree")
    kept = np.ones(frames.shape[:3], bool) if kept is None else kept.astype(bool)
    if kept.shape != frames.shape[:3]:
        raise TavError(f"kept: {kept.shape} must be {frames.shape[:3]}")
    if not kept.any():
        raise TavError("kept: no pixel counts")
    return kept
