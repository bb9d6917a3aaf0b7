"""The readers of the decoder process: both decoders agree, playlists are refused."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tav.media.frame_readers import read_source
from tav_model.errors import TavError
from tav_model.video import write_video
from tests.support.videos import decode, moving_square


def test_both_decoders_return_the_same_frames(tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    write_video(clip, moving_square(), Fraction(12))
    frames, rates = zip(*(read_source(clip, decode(width=96), reader)[:2] for reader in ("decord", "av")), strict=True)
    assert rates == (12, 12)
    assert np.abs(frames[0].astype(int) - frames[1]).mean() < 2


@pytest.mark.parametrize("text", ["ffconcat version 1.0\nfile x.mp4\n", "#EXTM3U\nx.mp4\n", "<?xml?><MPD></MPD>"])
def test_playlists_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "clip.mp4").write_text(text)
    with pytest.raises(TavError, match=r"^is a playlist, a list of other files"):
        read_source(tmp_path / "clip.mp4", decode(), "av")
