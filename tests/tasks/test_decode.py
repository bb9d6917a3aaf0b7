"""The decode stage: what it writes, and what it makes of files that need a second look."""

from __future__ import annotations

import os
import struct
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tasks.decode import decode
from tav.config import DecodeParams
from tav.media import decoder_process
from tav_model.digests import digest
from tav_model.errors import TavError
from tav_model.tensors import load_tensors
from tav_model.video import read_video, write_video
from tests.support.videos import write_tone

# The matrix of a track's header in an MP4, by the clockwise turn that makes the frames upright (ISO/IEC 14496-12, 8.3.2).
ONE, END = 1 << 16, 1 << 30
TURNS = {
    90: (0, ONE, 0, -ONE, 0, 0, 0, 0, END),
    180: (-ONE, 0, 0, 0, -ONE, 0, 0, 0, END),
    270: (0, -ONE, 0, ONE, 0, 0, 0, 0, END),
}
# Where the corner that is red before the turn comes to lie, as indexes of height and width.
CORNER = {0: (2, 2), 90: (2, -3), 180: (-3, -3), 270: (-3, 2)}


def params(**changes) -> DecodeParams:
    return DecodeParams(**{"frames": 4, "width": 64, "height": 64, "fit": "stretch"} | changes)


def red_corner(frames: int = 6) -> np.ndarray:
    video = np.full((frames, 64, 96, 3), 40, np.uint8)
    video[:, :16, :24] = (220, 30, 30)
    return video


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    write_video(path, red_corner(), Fraction(12))
    return path


def decoded(source: Path, **changes) -> np.ndarray:
    out = source.parent / "out"
    decode(source, out, params(**changes))
    return load_tensors(out / "frames.safetensors")[0]["frames"].numpy()


def refused(source: Path, **changes) -> str:
    with pytest.raises(TavError) as error:
        decode(source, source.parent / "out", params(**changes))
    assert "\n" not in str(error.value)
    return str(error.value)


# What it writes


def test_frames_and_video_are_the_same_clip(clip: Path, tmp_path: Path) -> None:
    decode(clip, tmp_path / "out", params())
    tensors, metadata = load_tensors(tmp_path / "out/frames.safetensors")
    video, fps = read_video(tmp_path / "out/source.mp4")
    assert tensors["frames"].shape == video.shape == (4, 64, 64, 3)
    assert np.abs(tensors["frames"].numpy().astype(int) - video).mean() < 4
    assert (metadata["stage"], metadata["shape"]) == ("decode", "f h w c")
    assert Fraction(metadata["fps"]) == fps == Fraction(12 * 3, 5)
    assert metadata["source"] == digest(clip)


def test_the_same_clip_gives_the_same_bytes(clip: Path, tmp_path: Path) -> None:
    for name in ("once", "twice"):
        decode(clip, tmp_path / name, params())
    assert digest(tmp_path / "once") == digest(tmp_path / "twice")
    assert sorted(path.name for path in (tmp_path / "once").iterdir()) == ["frames.safetensors", "source.mp4"]


def test_a_failure_leaves_the_former_result(clip: Path, tmp_path: Path) -> None:
    decoded(clip)
    before = digest(tmp_path / "out")
    assert "has 6 frames" in refused(clip, frames=7)
    assert digest(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4", "out"]


# Rotation


def turned(path: Path, turn: int) -> None:
    """Write the turn into the header of the first track."""
    content = path.read_bytes()
    matrix = content.index(b"tkhd") + 44
    path.write_bytes(content[:matrix] + struct.pack(">9i", *TURNS[turn]) + content[matrix + 36 :])


def write_av1(path: Path) -> None:
    """A codec that decord does not know, so that PyAV reads it."""
    policy = os.sched_getscheduler(0) if sys.platform == "linux" else None
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libsvtav1", rate=12, options={"preset": "12"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for pixels in red_corner():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    # For root, the encoder turns the calling thread into a real-time one, beside which nothing else on the machine runs.
    if policy is not None:
        os.sched_setscheduler(0, policy, os.sched_param(0))


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("codec", ["h264", "av1"])
def test_a_clip_from_a_turned_camera_is_upright(clip: Path, codec: str, turn: int) -> None:
    if codec == "av1":
        write_av1(clip)
    turned(clip, turn)
    red = decoded(clip)[..., 0] > 130
    assert [angle for angle, (row, column) in CORNER.items() if red[:, row, column].all()] == [turn]
    # A quarter turn makes the picture upright format, which `pad` shows as bars on the left and right.
    assert (decoded(clip, fit="pad")[:, :, 2].max() < 20) == (turn != 180)


def test_a_folder_from_a_turned_camera_is_upright(tmp_path: Path) -> None:
    folder, exif = tmp_path / "images", Image.Exif()
    folder.mkdir()
    exif[0x112] = 6  # Orientation: turn clockwise by 90 degrees.
    for number, pixels in enumerate(red_corner()):
        Image.fromarray(pixels).save(folder / f"{number}.png", exif=exif)
    red = decoded(folder)[..., 0] > 130
    assert [angle for angle, (row, column) in CORNER.items() if red[:, row, column].all()] == [90]


# What is refused


def test_a_playlist_of_other_files_is_refused(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile clip.mp4\n")
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.5,\nclip.mp4\n#EXT-X-ENDLIST\n")
    assert "is a playlist" in refused(tmp_path / "list.mp4")
    assert "is a playlist" in refused(tmp_path / "list.m3u8")


def test_a_codec_that_nothing_knows_is_refused(clip: Path) -> None:
    clip.write_bytes(clip.read_bytes().replace(b"avc1", b"zzzz"))
    assert "in a format that cannot be read" in refused(clip)


def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / ("x" * 300))


def test_images_that_are_not_looked_at_must_fit_too(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(1, 7):
        Image.new("RGB", (96, 64)).save(folder / f"{number}.png")
    Image.new("RGB", (32, 32)).save(folder / "2.png")
    assert "2.png is 32x32" in refused(folder, frames=2)


def test_images_of_16_bits_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        Image.fromarray(np.full((64, 64), 30000, np.uint16)).save(folder / f"{number}.png")
    assert "0.png has more than 8 bits" in refused(folder)


def test_a_decoder_that_crashes_is_one_line(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crashing = tmp_path / "crashing"
    crashing.write_text("#!/bin/sh\nkill -SEGV $$\n")
    crashing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crashing))
    assert "the decoder crashed on it (signal 11)" in refused(clip)


# Long clips and sound


def with_sound(path: Path) -> Path:
    """A video of a second with a tone of 440 Hz."""
    write_tone(path.with_suffix(".m4a"))
    write_video(path, red_corner(12), Fraction(12), path.with_suffix(".m4a"))
    path.with_suffix(".m4a").unlink()
    return path


def tone(path: Path) -> tuple[float, float]:
    """The frequency and the duration of the sound in a file."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
        rate = container.streams.audio[0].rate
    wave = np.concatenate(frames)
    return float(np.abs(np.fft.rfft(wave)).argmax() * rate / len(wave)), len(wave) / rate


def test_sound_of_a_complete_clip(tmp_path: Path) -> None:
    decode(with_sound(tmp_path / "clip.mp4"), tmp_path / "out", params(frames="all"))
    frequency, seconds = tone(tmp_path / "out/audio.m4a")
    assert frequency == pytest.approx(440, abs=5) and seconds == pytest.approx(1, abs=0.1)
    frames, fps = read_video(tmp_path / "out/source.mp4")
    assert len(frames) == 12 and fps == 12
    write_video(tmp_path / "edit.mp4", frames, fps, tmp_path / "out/audio.m4a")
    frequency, seconds = tone(tmp_path / "edit.mp4")
    assert frequency == pytest.approx(440, abs=5) and seconds == pytest.approx(1, abs=0.1)
    assert read_video(tmp_path / "edit.mp4")[0].shape == frames.shape
    write_video(tmp_path / "short.mp4", frames[:6], fps, tmp_path / "out/audio.m4a")
    assert tone(tmp_path / "short.mp4")[1] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("changes", [{"frames": 6}, {"frames": "all", "start": 1}])
def test_no_sound_of_a_part(tmp_path: Path, changes: dict) -> None:
    decode(with_sound(tmp_path / "clip.mp4"), tmp_path / "out", params(**changes))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["frames.safetensors", "source.mp4"]


def test_sound_that_cannot_be_read_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Path, target: Path) -> bool:
        target.write_text("half")
        raise ValueError("damaged sound")

    monkeypatch.setattr(decoder_process, "extract_audio", fails)
    answer = decoder_process._extract_audio(with_sound(tmp_path / "clip.mp4"), tmp_path / "audio.m4a")
    assert answer == {"no_audio": "damaged sound"} and not (tmp_path / "audio.m4a").exists()


def test_frames_are_written_in_parts(tmp_path: Path) -> None:
    """More frames than are in memory at a time, so that the file is made of several parts."""
    write_video(tmp_path / "clip.mp4", red_corner(20), Fraction(12))
    frames = decoded(tmp_path / "clip.mp4", frames="all")
    assert frames.shape == (20, 64, 64, 3)
    assert np.abs(frames.astype(int) - frames[0]).max() < 12
    assert len(read_video(tmp_path / "out/source.mp4")[0]) == 20
