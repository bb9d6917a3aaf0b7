"""The readers of the decoder process: both decoders agree, playlists are refused."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tav.media.frame_readers import Selection, read_source
from tav_model.errors import TavError
from tav_model.video import write_video
from tests.support.videos import decode, moving_square


class Collected(list):
    """Keeps the frames."""

    def start(self, count: int) -> None:
        self.clear()
        self.count = count

    def add(self, frame: np.ndarray) -> None:
        self.append(frame)


def read(clip: Path, reader: str, **changes) -> tuple[np.ndarray, Selection]:
    sink = Collected()
    selection = read_source(clip, decode(**changes), reader, sink)
    assert len(sink) == sink.count
    return np.stack(sink), selection


def test_both_decoders_return_the_same_frames(tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    write_video(clip, moving_square(), Fraction(12))
    frames, selections = zip(*(read(clip, reader, width=96) for reader in ("decord", "av")), strict=True)
    assert selections == ((12, 6, (96, 64), True),) * 2
    assert np.abs(frames[0].astype(int) - frames[1]).mean() < 2


@pytest.mark.parametrize("reader", ["decord", "av"])
@pytest.mark.parametrize(
    ("changes", "count", "fps", "complete"),
    [
        ({"frames": "all"}, 6, 12, True),
        ({"frames": "all", "start": 1}, 5, 12, False),
        ({"frames": "all", "sampling": "stride", "stride": 2}, 3, 6, False),
        ({"frames": 3}, 3, Fraction(24, 5), False),
    ],
)
def test_selection_of_frames(
    tmp_path: Path, reader: str, changes: dict[str, Any], count: int, fps: Fraction, complete: bool
) -> None:
    write_video(tmp_path / "clip.mp4", moving_square(), Fraction(12))
    frames, selection = read(tmp_path / "clip.mp4", reader, **changes)
    assert len(frames) == count and (selection.fps, selection.complete) == (fps, complete)


@pytest.mark.parametrize("text", ["ffconcat version 1.0\nfile x.mp4\n", "#EXTM3U\nx.mp4\n", "<?xml?><MPD></MPD>"])
def test_playlists_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "clip.mp4").write_text(text)
    with pytest.raises(TavError, match=r"^is a playlist, a list of other files"):
        read(tmp_path / "clip.mp4", "av")
