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
    similarity = Similarity()
    similarity.add(frames, source, kept)
    return similarity.psnr


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
    similarity = Similarity()
    similarity.add(frames, source, kept)
    return similarity.ssim


class Similarity:
    """`psnr` and `ssim` of a video that is given part by part."""

    def __init__(self) -> None:
        self.pixels = 0  # that count, so far
        self._error = 0.0
        self._sums, self._counts = {True: 0.0, False: 0.0}, {True: 0, False: 0}  # by whether windows lie within `kept`

    def add(self, frames: np.ndarray, source: np.ndarray, kept: np.ndarray | None = None) -> None:
        """Take the next frames into account; the arguments are those of `ssim`."""
        import cv2

        kept = _check(frames, source, kept)
        pixels = int(kept.sum())
        error = np.square((frames.astype(np.float64) - source) / 255)[kept].mean()
        self._error += (error - self._error) * (pixels / (self.pixels + pixels))
        self.pixels += pixels

        kernel = np.ones((WINDOW, WINDOW))
        inner = np.stack([cv2.erode(one.astype(np.uint8), kernel, borderValue=1) for one in kept]) > 0

        def blur(image: np.ndarray) -> np.ndarray:
            return cv2.GaussianBlur(image, (WINDOW, WINDOW), DEVIATION, borderType=cv2.BORDER_REFLECT)

        for x, y, *chosen in zip(
            frames.astype(np.float64) / 255, source.astype(np.float64) / 255, inner, kept, strict=True
        ):
            mean_x, mean_y = blur(x), blur(y)
            variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
            covariance = blur(x * y) - mean_x * mean_y
            luminance = (2 * mean_x * mean_y + K1**2) / (mean_x**2 + mean_y**2 + K1**2)
            values = luminance * (2 * covariance + K2**2) / (variance_x + variance_y + K2**2)
            for is_inner, pixels_of_frame in zip((True, False), chosen, strict=True):
                self._sums[is_inner] += values[pixels_of_frame].sum()
                self._counts[is_inner] += int(pixels_of_frame.sum()) * frames.shape[-1]

    @property
    def psnr(self) -> float:
        """As `psnr` returns it."""
        return float(min(HIGHEST_PSNR, -10 * np.log10(max(self._error, 1e-12))))

    @property
    def ssim(self) -> float:
        """As `ssim` returns it."""
        is_inner = self._counts[True] > 0
        return float(self._sums[is_inner] / self._counts[is_inner])


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
    fidelity = MotionFidelity(spacing)
    fidelity.add(motion, source)
    return fidelity.value


class MotionFidelity:
    """`motion_fidelity` of a video whose motion is given part by part; each part begins with the former's last frame."""

    def __init__(self, spacing: int = 8) -> None:
        self.spacing, self._pairs = spacing, 0
        self._ends: list[np.ndarray | None] = [None, None]
        self._sums: np.ndarray | float = 0.0

    def add(self, motion: Motion, source: Motion) -> None:
        """Take the next frames into account; the arguments are those of `motion_fidelity`."""
        if not len(motion.flow):
            return
        courses = [follow(one, self.spacing, start) for one, start in zip((motion, source), self._ends, strict=True)]
        self._ends = [positions[-1] for positions in courses]
        self._sums = self._sums + _cosine_sums(*(np.diff(positions, axis=0) for positions in courses))
        self._pairs += len(motion.flow)

    @property
    def value(self) -> float:
        """As `motion_fidelity` returns it."""
        if not self._pairs:
            return 1.0
        similarity = np.asarray(self._sums) / self._pairs
        return float((similarity.max(axis=1).mean() + similarity.max(axis=0).mean()) / 2)


def _cosine_sums(edit: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Return the sums of the cosines between courses, m n, for displacements ``f m 2`` and ``f n 2``."""
    lengths = [np.linalg.norm(steps, axis=-1) for steps in (edit, source)]
    moves = [length > STILL for length in lengths]
    units = [
        np.where(move[..., None], steps / np.maximum(length, 1e-9)[..., None], 0)
        for steps, length, move in zip((edit, source), lengths, moves, strict=True)
    ]
    cosines = np.einsum("fmi,fni->mn", *units)
    both_still = np.einsum("fm,fn->mn", *((~move).astype(np.float64) for move in moves))
    return cosines + both_still


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
