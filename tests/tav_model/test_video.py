"""Reading and writing videos: what players need, colours and frame rates, equal files for equal frames."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tav_model.errors import TavError
from tav_model.video import evenly_spaced, read_video, write_video
from tests.support.videos import moving_square

BARS = np.array([(235, 30, 30), (30, 200, 40), (40, 60, 230), (240, 240, 240), (15, 15, 15), (230, 200, 20)], np.uint8)


def bars(frames: int = 4) -> np.ndarray:
    """Six upright bars of colour, 64 by 96."""
    return np.broadcast_to(BARS.repeat(16, axis=0), (frames, 64, 96, 3)).copy()


def test_a_player_knows_the_colours_and_can_start_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bars.mp4"
    write_video(path, bars(), Fraction(10))
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        context = container.streams.video[0].codec_context
        assert (frame.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    frames, _ = read_video(path)
    centres = frames[:, 32, 8::16].astype(int)
    assert np.abs(centres - BARS).max() < 12


@pytest.mark.parametrize("fps", [Fraction(1), Fraction(10000, 1001), Fraction(30000, 1001) * 7 / 90, Fraction(240)])
def test_the_rate_comes_back_exactly(tmp_path: Path, fps: Fraction) -> None:
    write_video(tmp_path / "a.mp4", bars(), fps)
    assert read_video(tmp_path / "a.mp4")[1] == fps


def test_a_damaged_video_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with pytest.raises(TavError, match="no such file"):
        read_video(path)
    write_video(path, bars(), Fraction(10))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(TavError, match="not a video that can be read") as error:
        read_video(path)
    assert "\n" not in str(error.value)


def test_the_same_frames_give_the_same_mp4(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    written = set()
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, noise, Fraction(1))
        written.add((tmp_path / name).read_bytes())
    assert len(written) == 1


@pytest.mark.parametrize(("height", "width"), [(64, 96), (63, 95)])
def test_an_mp4_is_h264_that_plays_everywhere(tmp_path: Path, height: int, width: int) -> None:
    video = moving_square(height=height, width=width)
    write_video(tmp_path / "a.mp4", video, Fraction(30000, 1001))
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == Fraction(30000, 1001)
    frames, _ = read_video(tmp_path / "a.mp4")
    assert frames.shape == (6, 64, 96, 3)
    assert np.abs(frames[:, :height, :width].astype(int) - video).mean() < 4


def test_frames_are_selected_and_resized_as_asked(tmp_path: Path) -> None:
    """The brightness says which frame it is; the left and the right of a wide video are cropped."""
    video = np.stack([np.full((64, 96, 3), 10 * index, np.uint8) for index in range(21)])
    video[:, :, :8] = video[:, :, -8:] = 255
    write_video(tmp_path / "a.mp4", video, 10)
    frames, fps = read_video(tmp_path / "a.mp4", num_frames=5, height=32, width=32)
    assert frames.shape == (5, 32, 32, 3) and frames.dtype == np.uint8
    assert frames.mean((1, 2, 3)) == pytest.approx([0, 50, 100, 150, 200], abs=4)
    assert fps == 2  # a fifth of the frames, at the same speed
    assert read_video(tmp_path / "a.mp4", num_frames=1)[0].shape == (1, 64, 96, 3)
    for count in (0, 22):
        with pytest.raises(TavError, match=f"num_frames: {count} must be between 1 and 21"):
            read_video(tmp_path / "a.mp4", num_frames=count)


def test_frames_of_a_pipeline_are_written_as_they_are(tmp_path: Path) -> None:
    video = moving_square(height=64, width=64)
    write_video(tmp_path / "bytes.mp4", video, 12)
    write_video(str(tmp_path / "floats.mp4"), video / 255, 12.0)
    assert (tmp_path / "bytes.mp4").read_bytes() == (tmp_path / "floats.mp4").read_bytes()


@given(available=st.integers(1, 300), data=st.data())
def test_frames_are_evenly_spaced_from_the_first_to_the_last(available: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, available))
    indexes = evenly_spaced(available, count)
    assert len(indexes) == count and indexes[0] == 0
    if count > 1:
        gaps = np.diff(indexes)
        assert indexes[-1] == available - 1 and gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
