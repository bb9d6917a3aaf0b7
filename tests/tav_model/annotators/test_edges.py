"""Edges and line art: where they are, their form, and lines that do not flicker."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tav_model.annotators.edges import canny, lineart


def squares(frames: int = 3, side: int = 64, dark: int = 20, light: int = 220) -> np.ndarray:
    """A dark square on a light ground, one pixel further to the right in each frame."""
    pictures = np.full((frames, side, side, 3), light, np.uint8)
    for i in range(frames):
        pictures[i, 16:40, 16 + i : 40 + i] = dark
    return pictures


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.sampled_from([canny, lineart]))
def test_form_of_any_frames(frames, height, width, annotator):
    pictures = np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), np.uint8)
    conditions = annotator(pictures)
    assert conditions.shape == pictures.shape and conditions.dtype == np.uint8
    assert (conditions == conditions[..., :1]).all()


def test_canny_finds_the_outline_of_each_frame():
    edges = canny(squares())
    for i, frame in enumerate(edges[..., 0]):
        rows, columns = np.nonzero(frame)
        assert set(np.unique(frame)) == {0, 255}
        assert abs(rows.min() - 16) <= 1 and abs(rows.max() - 39) <= 1
        assert abs(columns.min() - 16 - i) <= 1 and abs(columns.max() - 39 - i) <= 1
        assert not frame[20:36, 22 + i : 34 + i].any()


def test_canny_is_opencvs_with_its_thresholds():
    picture = np.random.default_rng(0).integers(0, 64, (1, 32, 32, 3), np.uint8)
    assert np.array_equal(canny(picture)[0, ..., 0], cv2.Canny(picture[0], 100, 200))
    assert np.array_equal(canny(picture, 50, 400)[0, ..., 1], cv2.Canny(picture[0], 50, 400))
    assert not np.array_equal(canny(picture), canny(picture, 50, 400))


def test_lines_are_what_is_darker_than_its_surroundings():
    picture = np.full((1, 512, 512, 3), 200, np.uint8)
    picture[:, 100:104] = 40  # A dark line, and a light one.
    picture[:, 300:304] = 255
    lines = lineart(picture)[0, ..., 0]
    assert lines[102].min() > 100 and lines[200].max() == 0 and lines[302].max() == 0


@pytest.mark.parametrize("value", [0, 128, 255])
def test_flat_frames_have_neither(value):
    flat = np.full((2, 32, 32, 3), value, np.uint8)
    assert not canny(flat).any() and not lineart(flat).any()


def test_a_line_is_as_bright_in_every_frame():
    pictures = np.full((2, 128, 128, 3), 200, np.uint8)
    pictures[:, 60:63] = 100
    pictures[1, 100:103] = 0  # A darker line in one frame must not dim the other one.
    lines = lineart(pictures)
    assert np.array_equal(lines[0, 55:68], lines[1, 55:68])
