"""Previews of videos: they move, at the rate of the video, and equal frames make equal files."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from tav.media.videos import write_preview
from tests.support.videos import moving_square


def test_the_same_frames_give_the_same_preview_at_the_rate(tmp_path: Path) -> None:
    moving = np.stack([np.roll(frame, 8 * i, axis=1) for i, frame in enumerate(moving_square()[:5])])
    for name in ("a.webp", "b.webp"):
        write_preview(tmp_path / name, moving, Fraction(8))
    assert (tmp_path / "a.webp").read_bytes() == (tmp_path / "b.webp").read_bytes()
    with Image.open(tmp_path / "a.webp") as image:
        image.seek(2)
        image.load()
        assert image.info["duration"] == 125


def test_a_preview_moves(tmp_path: Path) -> None:
    write_preview(tmp_path / "a.webp", moving_square(), Fraction(10))
    with Image.open(tmp_path / "a.webp") as image:
        assert (image.n_frames, image.size) == (6, (96, 64))
