"""Previews of videos: they move, at the rate of the video, and equal frames make equal files."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from tav.media.videos import PREVIEW_FRAMES, Preview
from tests.support.videos import moving_square


def write_preview(path: Path, frames: np.ndarray, fps: Fraction, size: int = 4) -> None:
    preview = Preview(len(frames), fps)
    for start in range(0, len(frames), size):
        preview.add(frames[start : start + size])
    preview.write(path)


def test_the_same_frames_give_the_same_preview_at_the_rate(tmp_path: Path) -> None:
    moving = np.stack([np.roll(frame, 8 * i, axis=1) for i, frame in enumerate(moving_square()[:5])])
    for size, name in ((1, "a.webp"), (5, "b.webp")):
        write_preview(tmp_path / name, moving, Fraction(8), size)
    assert (tmp_path / "a.webp").read_bytes() == (tmp_path / "b.webp").read_bytes()
    with Image.open(tmp_path / "a.webp") as image:
        image.seek(2)
        image.load()
        assert image.info["duration"] == 125


def test_a_preview_moves(tmp_path: Path) -> None:
    write_preview(tmp_path / "a.webp", moving_square(), Fraction(10))
    with Image.open(tmp_path / "a.webp") as image:
        assert (image.n_frames, image.size) == (6, (96, 64))


def test_a_long_preview_is_sampled_and_takes_as_long(tmp_path: Path) -> None:
    frames = np.zeros((3 * PREVIEW_FRAMES, 16, 3 * PREVIEW_FRAMES, 3), np.uint8)
    frames[np.arange(len(frames)), :, np.arange(len(frames))] = 255  # A line that moves on with each frame.
    write_preview(tmp_path / "a.webp", frames, Fraction(30))
    with Image.open(tmp_path / "a.webp") as image:
        assert image.n_frames == PREVIEW_FRAMES
        image.load()
        assert image.info["duration"] == 100
