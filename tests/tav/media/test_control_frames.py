"""Conditions that the user has: of the clip's number of frames and shape, and refused in one line otherwise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tav.config import DecodeParams
from tav.media.control_frames import driving_section, read_given_frames
from tav_model.errors import TavError

DECODE = DecodeParams(frames=3, width=96, height=64, start=1)


def folder(path: Path, frames: int, width: int = 96, height: int = 64) -> Path:
    """Numbered images, each of a grey of its own."""
    path.mkdir(parents=True)
    for number in range(frames):
        Image.new("RGB", (width, height), (10 * number,) * 3).save(path / f"{number:03}.png")
    return path


def greys(frames: np.ndarray) -> list[int]:
    assert frames.dtype == np.uint8 and frames.shape[1:] == (64, 96, 3)
    return [int(frame[0, 0, 0]) for frame in frames]


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return folder(tmp_path / "clip", 8)


def test_as_many_frames_as_the_clip_are_selected_as_the_clip_is(clip: Path, tmp_path: Path) -> None:
    assert greys(read_given_frames(folder(tmp_path / "all", 8), clip, DECODE)) == [10, 40, 70]


def test_as_many_frames_as_the_section_selects_are_used_as_they_are(clip: Path, tmp_path: Path) -> None:
    assert greys(read_given_frames(folder(tmp_path / "selected", 3, 192, 128), clip, DECODE)) == [0, 10, 20]


def test_an_image_is_for_all_frames(clip: Path, tmp_path: Path) -> None:
    Image.new("RGB", (96, 64), (50,) * 3).save(tmp_path / "still.png")
    assert greys(read_given_frames(tmp_path / "still.png", clip, DECODE)) == [50] * 3


def test_another_number_or_shape_is_refused(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(TavError, match=r"has 5 frames; must have 8, as the clip, or 3, as decode\.frames"):
        read_given_frames(folder(tmp_path / "five", 5), clip, DECODE)
    with pytest.raises(TavError, match=r"has 5 frames; must have 8, as the clip$"):
        read_given_frames(tmp_path / "five", clip, DECODE.model_copy(update={"frames": 8, "start": 0}))
    with pytest.raises(TavError, match="has 64x64 pixels; must have the shape of 96x64"):
        read_given_frames(folder(tmp_path / "square", 8, 64, 64), clip, DECODE)
    with pytest.raises(TavError, match="none: no such file"):
        read_given_frames(tmp_path / "none", clip, DECODE)


def test_a_clip_that_drives_another_keeps_its_own_selection() -> None:
    own = DecodeParams(frames=20, width=512, height=512, fit="pad", start=4, sampling="stride", stride=2)
    section = driving_section(own, DECODE)
    assert (section.frames, section.width, section.height) == (3, 96, 64)
    assert (section.start, section.stride, section.fit) == (4, 2, "pad")
