"""Reading clips that nobody vouches for, and the videos that we write."""

from __future__ import annotations

import os
import random
import resource
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tav.config import DecodeParams
from tav.media.decoding import read_frames
from tav.media.frame_selection import playback_rate, select_frames
from tav.media.videos import contact_sheet, read_mp4, write_mp4, write_preview
from tav_model.errors import TavError


def decode(**changes) -> DecodeParams:
    return DecodeParams(**{"frames": 6, "width": 64, "height": 64} | changes)


def moving_square(frames: int = 6, height: int = 64, width: int = 96) -> np.ndarray:
    """A bright square on a gradient, further right in each frame."""
    video = np.zeros((frames, height, width, 3), np.uint8)
    video[..., 2] = np.linspace(40, 160, width).astype(np.uint8)
    for i, frame in enumerate(video):
        frame[20:36, 8 + 8 * i : 24 + 8 * i] = (230, 120, 30)
    return video


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    write_mp4(path, moving_square(), Fraction(12))
    return path


# Which frames


@given(available=st.integers(1, 400), frames=st.integers(1, 40), start=st.integers(0, 50), stride=st.integers(1, 9))
def test_selected_frames_exist_and_go_forward(available: int, frames: int, start: int, stride: int) -> None:
    for sampling in ("uniform", "stride"):
        chosen = decode(frames=frames, start=start, stride=stride, sampling=sampling)
        try:
            indexes = select_frames(chosen, available)
        except TavError:
            assert start + (frames if sampling == "uniform" else (frames - 1) * stride + 1) > available
            continue
        assert len(set(indexes)) == frames and indexes == sorted(indexes)
        assert start == indexes[0] and indexes[-1] < available
        if sampling == "stride":
            assert all(b - a == stride for a, b in pairwise(indexes))
        elif frames > 1:
            assert indexes[-1] == available - 1


def test_the_rate_keeps_the_speed_of_the_source() -> None:
    every_third = decode(sampling="stride", stride=3)
    assert playback_rate(Fraction(30000, 1001), select_frames(every_third, 91)) == Fraction(10000, 1001)
    assert playback_rate(Fraction(24), [0, 1, 2, 3, 4, 5]) == 24
    assert playback_rate(Fraction(25), [7]) == 25


# From files


def test_an_mp4_gives_its_frames_and_rate(clip: Path) -> None:
    frames, fps = read_frames(clip, decode(width=96))
    assert (frames.shape, fps) == ((6, 64, 96, 3), 12)
    assert np.abs(frames.astype(int) - moving_square()).mean() < 6


def written(path: Path) -> Path:
    """The moving square in the format of the suffix."""
    video = moving_square()
    if path.suffix == ".mp4":
        write_mp4(path, video, Fraction(12))
    elif path.suffix == ".gif":
        images = [Image.fromarray(frame) for frame in video]
        images[0].save(path, save_all=True, append_images=images[1:], duration=100)
    else:
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libvpx-vp9", rate=10, options={"crf": "10", "b": "0"})
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
            for frame in video:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("suffix", ["gif", "webm"])
def test_other_formats_give_the_same_frames(tmp_path: Path, suffix: str) -> None:
    frames, fps = read_frames(written(tmp_path / f"clip.{suffix}"), decode(width=96))
    assert (frames.shape, fps) == ((6, 64, 96, 3), 10)
    assert np.abs(frames.astype(int) - moving_square()).mean() < 12


def numbered_images(folder: Path, numbers: list[int], size: tuple[int, int] = (96, 64)) -> Path:
    folder.mkdir()
    for number in numbers:
        Image.new("RGB", size, (number, 0, 0)).save(folder / f"frame_{number}.png")
    return folder


def test_a_folder_of_images_is_read_by_number(tmp_path: Path) -> None:
    frames, fps = read_frames(numbered_images(tmp_path / "images", [8, 9, 10, 11]), decode(frames=4))
    assert (frames[:, 0, 0, 0].tolist(), fps) == ([8, 9, 10, 11], 8)


@pytest.mark.parametrize(
    ("fit", "left", "top"),
    [("crop", (0, 0, 200), (0, 0, 200)), ("pad", (0, 0, 200), (0, 0, 0)), ("stretch", (200, 0, 0), (0, 0, 200))],
)
def test_another_aspect_is_cropped_padded_or_stretched(tmp_path: Path, fit: str, left: tuple, top: tuple) -> None:
    image = np.zeros((64, 192, 3), np.uint8)
    image[:, :, 2] = 200
    image[:, :32] = image[:, -32:] = (200, 0, 0)
    (tmp_path / "images").mkdir()
    Image.fromarray(image).save(tmp_path / "images/1.png")
    frames, _ = read_frames(tmp_path / "images", decode(frames=1, fit=fit, width=64, height=64))
    assert np.abs(frames[0, 32, 3].astype(int) - (left if fit != "pad" else (200, 0, 0))).max() < 25
    assert np.abs(frames[0, 2, 32].astype(int) - top).max() < 25


# What is wrong


def refused(path: Path, **changes) -> str:
    with pytest.raises(TavError) as error:
        read_frames(path, decode(**changes), seconds=60)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_no_video_is_refused(tmp_path: Path, clip: Path) -> None:
    empty, text, broken = tmp_path / "empty.mp4", tmp_path / "text.mp4", tmp_path / "broken.mp4"
    empty.touch()
    text.write_text("no video\n" * 99)
    broken.write_bytes(clip.read_bytes()[:-900])
    assert "no such file" in refused(tmp_path / "missing.mp4")
    assert "is empty" in refused(empty)
    assert "not a video" in refused(text)
    refused(broken)


def test_sound_alone_is_refused(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    refused(tmp_path / "sound.mp4")


def test_a_clip_that_is_too_short_says_how_long_it_is(clip: Path) -> None:
    assert "has 6 frames, but 9 are needed" in refused(clip, frames=9)
    assert "has 6 frames, but 11 are needed" in refused(clip, sampling="stride", stride=2)
    assert "3 of them from decode.start 3" in refused(clip, start=3)


def test_a_wrong_suffix_does_not_matter(clip: Path) -> None:
    renamed = clip.rename(clip.with_suffix(".txt"))
    assert read_frames(renamed, decode())[0].shape == (6, 64, 64, 3)


def test_folders_with_gaps_or_mixed_sizes_are_refused(tmp_path: Path) -> None:
    assert "image number 3 is missing" in refused(numbered_images(tmp_path / "gap", [1, 2, 4, 5, 6, 7]))
    mixed = numbered_images(tmp_path / "mixed", [1, 2, 3, 4, 5])
    Image.new("RGB", (32, 32)).save(mixed / "6.png")
    assert "6.png is 32x32, the ones before are 96x64" in refused(mixed)
    (tmp_path / "none").mkdir()
    assert "no images" in refused(tmp_path / "none")


def damaged(data: bytes, seed: int) -> bytes:
    """The bytes with some of them flipped, and in one of three cases the end missing."""
    chance = random.Random(seed)
    content = bytearray(data)
    for _ in range(chance.choice([1, 10, 100])):
        content[chance.randrange(len(content))] = chance.randrange(256)
    return bytes(content[: chance.randrange(len(content)) if seed % 3 == 0 else None])


@pytest.mark.parametrize(
    ("suffix", "count"),
    [
        ("mp4", 12),
        ("webm", 4),
        ("gif", 4),
        pytest.param("mp4", 500, marks=[pytest.mark.long, pytest.mark.timeout(3600)]),
        pytest.param("webm", 150, marks=[pytest.mark.long, pytest.mark.timeout(3600)]),
        pytest.param("gif", 150, marks=[pytest.mark.long, pytest.mark.timeout(3600)]),
    ],
)
def test_damaged_videos_are_read_or_refused(tmp_path: Path, suffix: str, count: int) -> None:
    clip = written(tmp_path / f"clip.{suffix}")
    data = clip.read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(count):
        clip.write_bytes(damaged(data, seed))
        try:
            frames, _ = read_frames(clip, decode(), seconds=60)
        except TavError as error:
            assert "\n" not in str(error) and "took more than" not in str(error), (seed, error)
        else:
            assert frames.shape == (6, 64, 64, 3)
        assert os.listdir(tmp_path) == [clip.name]
    # Of this process, in KiB; the decoders' own memory is bounded by the child's limit.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 2**10


def test_a_reader_that_takes_too_long_is_given_up(clip: Path) -> None:
    with pytest.raises(TavError, match=r"took more than 0\.05 s"):
        read_frames(clip, decode(), seconds=0.05)


@pytest.mark.skipif(
    "TAV_TEST_CLIPS" not in os.environ, reason="TAV_TEST_CLIPS does not name the folder of the real clips"
)
def test_real_clips() -> None:
    clips = Path(os.environ["TAV_TEST_CLIPS"])
    frames, fps = read_frames(clips / "man-skiing.mp4", decode(frames=8))
    assert (frames.shape, fps) == ((8, 64, 64, 3), Fraction(30000, 1001) * 7 / 90)
    frames, fps = read_frames(clips / "car-turn.mp4", decode(frames=80))
    assert (len(frames), fps) == (80, 10)


# What we write


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


def test_a_contact_sheet_has_a_row_for_each_video(tmp_path: Path) -> None:
    rows = [("the source", moving_square()), ("ein Würfel, 立方体 " * 30, 255 - moving_square())]
    contact_sheet(tmp_path / "one.png", rows[:1])
    contact_sheet(tmp_path / "two.png", rows)
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert one.width == two.width and two.height > one.height * 1.4
