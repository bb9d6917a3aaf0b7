"""Metrics of what an edit keeps, against direct computations and values worked out by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tav_model.errors import TavError
from tav_model.metrics.preservation import K1, K2, motion_fidelity, psnr, ssim
from tav_model.metrics.temporal import Motion, estimate_motion, follow
from tests.support.tiny_clip import texture

SHAPE = (2, 16, 20, 3)
FRAMES = arrays.arrays(np.uint8, SHAPE)
SOURCE = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)


def shifted(amount):
    return (SOURCE // 2 + 64).astype(np.uint8), (SOURCE // 2 + 64 + amount).astype(np.uint8)


def test_psnr_of_a_constant_difference():
    assert psnr(*shifted(8)) == pytest.approx(20 * np.log10(255 / 8))


@given(frames=FRAMES, kept=arrays.arrays(bool, SHAPE[:3]))
def test_only_kept_pixels_count(frames, kept):
    kept[0, 0, 0] = True
    changed = frames.copy()
    changed[~kept] += 17
    assert psnr(changed, SOURCE, kept) == psnr(frames, SOURCE, kept)


@given(frames=FRAMES)
def test_equal_frames_are_the_best(frames):
    assert psnr(frames, frames) == 100 and ssim(frames, frames) == pytest.approx(1)


def test_ssim_is_its_definition():
    """At a pixel in the middle, with explicit weighted sums over the window."""
    frames = (0.7 * SOURCE + 0.3 * np.random.default_rng(1).integers(0, 256, SHAPE)).astype(np.uint8)
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for f, row, column, c in np.ndindex(2, 6, 10, 3):
        x, y = (one[f, row : row + 11, column : column + 11, c] / 255 for one in (frames, SOURCE))
        mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
        variance_x, variance_y = (weights * (x - mean_x) ** 2).sum(), (weights * (y - mean_y) ** 2).sum()
        covariance = (weights * (x - mean_x) * (y - mean_y)).sum()
        values.append(
            (2 * mean_x * mean_y + K1**2)
            * (2 * covariance + K2**2)
            / (mean_x**2 + mean_y**2 + K1**2)
            / (variance_x + variance_y + K2**2)
        )
    inside = np.zeros(SHAPE[:3], bool)
    inside[:, 5:11, 5:15] = True  # The pixels whose window does not reach the border; no window lies within them.
    assert ssim(frames, SOURCE, inside) == pytest.approx(np.mean(values), abs=1e-6)


def test_ssim_does_not_see_what_is_around():
    kept = np.zeros((1, 40, 40), bool)
    kept[:, :, :20] = True
    source = np.random.default_rng(0).integers(0, 256, (1, 40, 40, 3), dtype=np.uint8)
    frames = source.copy()
    frames[~kept] = 0
    assert ssim(frames, source, kept) == pytest.approx(1) and ssim(frames, source) < 0.6


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_what_cannot_be_compared_is_refused(metric):
    with pytest.raises(TavError, match=r"they must agree"):
        metric(SOURCE, SOURCE[:, :8])
    with pytest.raises(TavError, match=r"kept: no pixel counts"):
        metric(SOURCE, SOURCE, np.zeros(SHAPE[:3], bool))
    with pytest.raises(TavError, match=r"kept: \(2, 8, 8\) must be \(2, 16, 20\)"):
        metric(SOURCE, SOURCE, np.ones((2, 8, 8), bool))


# Motion


def uniform(*steps, size=32):
    """A motion of all pixels alike, by ``steps`` (x, y) from frame to frame."""
    flow = np.broadcast_to(np.array(steps, np.float32)[:, None, None], (len(steps), size, size, 2)).copy()
    return Motion(flow, np.ones(flow.shape[:3], bool))


def test_points_follow_the_motion():
    positions = follow(uniform((1, 0), (0.5, 2)), spacing=16)
    assert positions[0].tolist() == [[8, 8], [24, 8], [8, 24], [24, 24]]
    assert (positions[1] - positions[0]).tolist() == [[1, 0]] * 4
    assert (positions[2] - positions[1]).tolist() == [[0.5, 2]] * 4


@settings(max_examples=20)
# Slow enough for no point to leave the picture, at whose border it would stop.
@given(angle=st.floats(-3, 3), speed=st.floats(0.5, 2), factor=st.floats(0.5, 1.5))
def test_motion_fidelity_is_the_cosine_of_directions(angle, speed, factor):
    source = uniform((speed, 0), (speed, 0))
    turned = uniform(*[(factor * np.cos(angle), factor * np.sin(angle))] * 2, size=48)
    assert motion_fidelity(turned, source) == pytest.approx(np.cos(angle), abs=1e-4)


def test_standing_still_instead_of_moving_is_no_fidelity():
    moving, still = uniform((2, 0), (2, 0)), uniform((0, 0), (0, 0))
    assert motion_fidelity(still, moving) == 0 and motion_fidelity(still, still) == 1


def test_a_point_finds_the_course_that_is_like_its_own_wherever_it_is():
    left_and_right = uniform((2, 0))
    left_and_right.flow[:, :, 16:, 0] = -2
    mirrored = uniform((-2, 0))
    mirrored.flow[:, :, 16:, 0] = 2
    assert motion_fidelity(mirrored, left_and_right) == pytest.approx(1)
    assert motion_fidelity(uniform((2, 0)), left_and_right) == pytest.approx((1 + (1 - 1) / 2) / 2)


def test_recoloured_pan_keeps_its_motion():
    pattern = texture(64, 64)
    frames = np.stack([pattern[:48, i : i + 48] for i in range(0, 12, 3)])
    back = frames[::-1].copy()
    source = estimate_motion(frames)
    assert motion_fidelity(estimate_motion(frames[..., ::-1].copy()), source) > 0.9
    assert motion_fidelity(estimate_motion(back), source) < 0


def test_single_frames_have_no_motion_to_lose():
    empty = Motion(np.zeros((0, 16, 16, 2), np.float32), np.zeros((0, 16, 16), bool))
    assert motion_fidelity(empty, empty) == 1
    with pytest.raises(TavError, match=r"motion: of 2 frames, but that of the source has 1"):
        motion_fidelity(uniform((1, 0), size=16), empty)
