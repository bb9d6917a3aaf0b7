"""Videos and previews: what players need, colours and frame rates, equal files for equal frames."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tav.media.videos import read_mp4, write_mp4, write_preview
from tav_model.errors import TavError
from tests.support.videos import moving_square

BARS = np.array([(235, 30, 30), (30, 200, 40), (40, 60, 230), (240, 240, 240), (15, 15, 15), (230, 200, 20)], np.uint8)


def bars(frames: int = 4) -> np.ndarray:
    """Six upright bars of colour, 64 by 96."""
    return np.broadcast_to(BARS.repeat(16, axis=0), (frames, 64, 96, 3)).copy()


def test_a_player_knows_the_colours_and_can_start_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bars.mp4"
    write_mp4(path, bars(), Fraction(10))
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        context = container.streams.video[0].codec_context
        assert (frame.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    frames, _ = read_mp4(path)
    centres = frames[:, 32, 8::16].astype(int)
    assert np.abs(centres - BARS).max() < 12


@pytest.mark.parametrize("fps", [Fraction(1), Fraction(10000, 1001), Fraction(30000, 1001) * 7 / 90, Fraction(240)])
def test_the_rate_comes_back_exactly(tmp_path: Path, fps: Fraction) -> None:
    write_mp4(tmp_path / "a.mp4", bars(), fps)
    assert read_mp4(tmp_path / "a.mp4")[1] == fps


def test_a_damaged_video_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with pytest.raises(TavError, match="no such file"):
        read_mp4(path)
    write_mp4(path, bars(), Fraction(10))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(TavError, match="not a video of this project") as error:
        read_mp4(path)
    assert "\n" not in str(error.value)


def test_the_same_frames_give_the_same_preview_at_the_rate(tmp_path: Path) -> None:
    moving = np.stack([np.roll(frame, 8 * i, axis=1) for i, frame in enumerate(bars(5))])
    for name in ("a.webp", "b.webp"):
        write_preview(tmp_path / name, moving, Fraction(8))
    assert (tmp_path / "a.webp").read_bytes() == (tmp_path / "b.webp").read_bytes()
    with Image.open(tmp_path / "a.webp") as image:
        image.seek(2)
        image.load()
        assert image.info["duration"] == 125


def test_the_same_frames_give_the_same_mp4(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    written = set()
    for name in ("a.mp4", "b.mp4"):
        write_mp4(tmp_path / name, noise, Fraction(1))
        written.add((tmp_path / name).read_bytes())
    assert len(written) == 1


@pytest.mark.parametrize(("height", "width"), [(64, 96), (63, 95)])
def test_an_mp4_is_h264_that_plays_everywhere(tmp_path: Path, height: int, width: int) -> None:
    video = moving_square(height=height, width=width)
    write_mp4(tmp_path / "a.mp4", video, Fraction(30000, 1001))
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == Fraction(30000, 1001)
    frames, _ = read_mp4(tmp_path / "a.mp4")
    assert frames.shape == (6, 64, 96, 3)
    assert np.abs(frames[:, :height, :width].astype(int) - video).mean() < 4


def test_a_preview_moves(tmp_path: Path) -> None:
    write_preview(tmp_path / "a.webp", moving_square(), Fraction(10))
    with Image.open(tmp_path / "a.webp") as image:
        assert (image.n_frames, image.size) == (6, (96, 64))
