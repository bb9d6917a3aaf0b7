"""Temporal metrics: values worked out by hand, and what they must not depend on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tav_model.errors import TavError
from tav_model.metrics.temporal import estimate_motion, flicker, visible_pixels, warping_error
from tests.support.tiny_clip import texture


def panning(shift, count=4, size=48):
    """A window that moves over a still pattern by ``shift`` (x, y) pixels a frame: f h w c."""
    pattern = texture(size + 40, size + 40)
    x, y = 20 - np.arange(count) * shift[0], 20 - np.arange(count) * shift[1]
    return np.stack([pattern[j : j + size, i : i + size] for i, j in zip(x, y, strict=True)])


@pytest.mark.parametrize("shift", [(0, 0), (1, 0), (0, -2), (3, 2)])
def test_motion_of_a_pan_is_the_pan(shift):
    motion = estimate_motion(panning(shift))
    assert motion.flow.shape == (3, 48, 48, 2)
    assert motion.visible.shape == (3, 48, 48)
    assert motion.visible.mean() > 0.6
    error = np.linalg.norm(motion.flow - np.array(shift), axis=-1)[motion.visible]
    assert np.median(error) < 0.1


def test_motion_is_found_at_full_resolution():
    motion = estimate_motion(panning((1, 0), count=2, size=128))
    error = np.linalg.norm(motion.flow - np.array((1, 0)), axis=-1)[motion.visible]
    assert np.percentile(error, 90) < 0.02


def test_a_pixel_that_the_flow_back_does_not_return_to_is_hidden():
    forward, backward = np.zeros((2, 16, 16, 2), np.float32)
    assert visible_pixels(forward, backward).all()
    backward[:8, :, 0] = 3
    visible = visible_pixels(forward, backward)
    assert not visible[:8].any()
    assert visible[8:].all()
    backward[:8, :, 0] = 0.7  # 0.49 is within the tolerance of 0.5
    assert visible_pixels(forward, backward).all()

    forward[..., 0], backward[..., 0] = 3, -3
    backward[:, 10, 0] = 0  # what stood at 7 should have come from 10
    assert np.flatnonzero(~visible_pixels(forward, backward)[0]).tolist() == [7, 13, 14, 15]


def test_pixels_beside_a_motion_boundary_are_hidden():
    forward = np.zeros((16, 16, 2), np.float32)
    forward[8:, :, 0] = 2  # the lower half moves to the right, the upper stays
    visible = visible_pixels(forward, -forward)
    assert visible[:7].all()
    assert not visible[7:9].any()
    assert visible[9:, :14].all()
    assert not visible[9:, 14:].any()  # leaves the frame


def test_what_leaves_the_frame_is_not_visible():
    motion = estimate_motion(panning((3, 0)))
    assert not motion.visible[:, :, -2:].any()
    assert motion.visible[:, 10:-10, 10:-10].mean() > 0.8


def test_warping_error_tells_a_steady_video_from_noise():
    source = panning((2, 1))
    motion = estimate_motion(source)
    noise = np.random.default_rng(1).integers(0, 256, source.shape, dtype=np.uint8)
    assert warping_error(source, motion) < 1e-4
    assert warping_error(255 - source, motion) < 1e-4  # repainted, same motion: steady too
    assert warping_error(np.repeat(source[:1], 4, axis=0), motion) > 1e-3  # the motion is gone
    # two independent uniform values in [0, 1] differ by 1/6 in the mean square; whole pixels are not interpolated
    still = estimate_motion(panning((0, 0)))
    assert warping_error(noise, still) == pytest.approx(1 / 6, rel=0.02)


def test_warping_error_is_the_mean_square_in_units_of_the_full_range():
    still = estimate_motion(panning((0, 0), count=3))
    edit = np.zeros((3, 48, 48, 3), np.uint8)
    edit[1] = 51  # 0.2
    assert warping_error(edit, still) == pytest.approx(0.04)
    edit[2, :, :, 0] = 51  # the second pair differs in two channels of three
    assert warping_error(edit, still) == pytest.approx((0.04 + 0.04 * 2 / 3) / 2)


def test_hidden_pixels_and_pairs_do_not_count():
    motion = estimate_motion(panning((0, 0), count=3))
    edit = np.zeros((3, 48, 48, 3), np.uint8)
    edit[1, :24] = 255
    motion.visible[0, :24] = False
    motion.visible[1] = False
    assert warping_error(edit, motion) == 0
    motion.visible[0, :24] = True
    assert warping_error(edit, motion) == pytest.approx(0.5)
    motion.visible[0] = False
    assert warping_error(edit, motion) == 0


def test_flicker_is_the_mean_change_of_luma():
    frames = np.zeros((3, 4, 5, 3), np.uint8)
    frames[1] = 51
    assert flicker(frames) == pytest.approx(0.2)
    frames[2] = 51
    assert flicker(frames) == pytest.approx(0.1)
    red = np.zeros((2, 4, 5, 3), np.uint8)
    red[1, ..., 0] = 255
    assert flicker(red) == pytest.approx(0.299, abs=0.002)


@settings(max_examples=20)
@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.just(3))))
def test_flicker_knows_no_direction_of_time_and_no_sign(frames):
    assert 0 <= flicker(frames) <= 1
    assert flicker(frames[::-1]) == pytest.approx(flicker(frames))
    assert flicker(np.repeat(frames[:1], 3, axis=0)) == 0


def test_a_single_frame_is_steady():
    frame = panning((0, 0), count=1)
    motion = estimate_motion(frame)
    assert motion.flow.shape == (0, 48, 48, 2)
    assert warping_error(frame, motion) == flicker(frame) == 0


def test_frames_that_do_not_fit_are_named():
    motion = estimate_motion(panning((0, 0)))
    with pytest.raises(TavError, match="3 of 48x48, but the source has 4 of 48x48"):
        warping_error(panning((0, 0), count=3), motion)
    with pytest.raises(TavError, match="32x32"):
        warping_error(panning((0, 0), size=32), motion)
    with pytest.raises(TavError, match="12x12 or more"):
        estimate_motion(np.zeros((2, 8, 64, 3), np.uint8))
    for bad in (
        np.zeros((2, 16, 16, 3), np.float32),
        np.zeros((2, 16, 16), np.uint8),
        np.zeros((0, 16, 16, 3), np.uint8),
    ):
        with pytest.raises(TavError, match="f h w c"):
            flicker(bad)
