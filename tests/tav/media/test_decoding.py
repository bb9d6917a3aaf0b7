"""Reading untrusted videos: formats, errors, and damaged files."""

from __future__ import annotations

import os
import random
import resource
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tav.media.decoding import read_frames
from tav_model.errors import TavError
from tav_model.video import write_video
from tests.support.videos import decode, moving_square


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    write_video(path, moving_square(), Fraction(12))
    return path


# From files


def test_an_mp4_gives_its_frames_and_rate(clip: Path) -> None:
    frames, fps = read_frames(clip, decode(width=96))
    assert (frames.shape, fps) == ((6, 64, 96, 3), 12)
    assert np.abs(frames.astype(int) - moving_square()).mean() < 6


def written(path: Path) -> Path:
    """The moving square in the format of the suffix."""
    video = moving_square()
    if path.suffix == ".mp4":
        write_video(path, video, Fraction(12))
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
    assert "not a video that can be read" in refused(broken)


def test_sound_alone_is_refused(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert refused(tmp_path / "sound.mp4").endswith(": has no video stream")


def test_a_clip_that_is_too_short_says_how_long_it_is(clip: Path) -> None:
    assert "has 6 frames, but 9 are needed" in refused(clip, frames=9)
    assert "has 6 frames, but 11 are needed" in refused(clip, sampling="stride", stride=2)
    assert refused(clip, start=3).endswith(
        "3 of them from decode.start 3, but 6 are needed for decode.frames 6; ask for fewer"
    )
    assert refused(clip, start=9).endswith(
        "0 of them from decode.start 9, but 6 are needed for decode.frames 6; start earlier"
    )


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


@pytest.mark.slow
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
        frames, message = None, ""
        try:
            frames, _ = read_frames(clip, decode(), seconds=60)
        except TavError as error:
            message = str(error)
        if frames is None:
            assert "\n" not in message and "took more than" not in message, (seed, message)
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
