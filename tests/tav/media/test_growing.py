"""A video that grows plays after each part, and has all frames at the end."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np

from tav.media.growing import GrowingVideo
from tav_model.video import read_video
from tests.support.videos import moving_square


def test_it_plays_after_each_part(tmp_path: Path) -> None:
    frames, parts = np.tile(moving_square(), (2, 1, 1, 1)), ((0, 5), (5, 6), (6, 12))
    for start, stop in parts:
        growing = GrowingVideo(tmp_path, Fraction(12))  # as after an interruption
        assert start not in growing
        growing.add(start, (frames[i : i + 2] for i in range(start, stop, 2)) if stop > 6 else [frames[start:stop]])
        assert start in growing
        played, fps = read_video(growing.path)
        assert len(played) == stop and fps == 12
        assert np.abs(played.astype(int) - frames[:stop]).mean() < 4
