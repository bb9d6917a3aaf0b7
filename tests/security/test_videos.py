"""A corpus of videos and folders that are broken, lie, or are none: each is read, or refused in one line and in time."""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tav.media.decoding import read_frames
from tav_model.errors import TavError
from tav_model.video import write_video
from tests.support.projects import ROOT
from tests.support.videos import decode, moving_square

SECONDS = 60
READ = "it is read"


def video(
    path: Path, frames: np.ndarray, codec: str = "libx264", pixels: str = "yuv420p", times: list[int] = ()
) -> Path:
    """A video of the frames, at the times in milliseconds where they are given."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=1000 if times else 12)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            if times:
                picture.pts, picture.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def mp4(path: Path) -> Path:
    write_video(path, moving_square(), Fraction(12))
    return path


def patched(path: Path, box: bytes, offset: int, value: bytes) -> Path:
    """An MP4 whose box says something else at `offset` from its name."""
    content = bytearray(mp4(path).read_bytes())
    begin = content.index(box, content.index(b"stsd") if box == b"avc1" else 0) + offset
    content[begin : begin + len(value)] = value
    path.write_bytes(content)
    return path


def lying_size(path: Path, width: int, height: int) -> Path:
    patched(path, b"avc1", 28, struct.pack(">HH", width, height))
    content = bytearray(path.read_bytes())
    begin = content.index(b"tkhd") + 80
    content[begin : begin + 8] = struct.pack(">HHHH", width, 0, height, 0)
    path.write_bytes(content)
    return path


def png(path: Path, width: int, height: int) -> Path:
    """A PNG that claims a size and has next to no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**5))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def images(folder: Path, *numbers: int) -> Path:
    folder.mkdir()
    for number in numbers:
        Image.new("RGB", (96, 64)).save(folder / f"{number}.png")
    return folder


def gif_of_one_size(path: Path, width: int, height: int) -> Path:
    Image.new("P", (8, 8)).save(path)
    content = bytearray(path.read_bytes())
    content[6:10] = struct.pack("<HH", width, height)
    path.write_bytes(content)
    return path


def sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def sparse(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(2**40)
    return path


def text(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def with_special(folder: Path, make: Callable[[Path], object]) -> Path:
    """A folder of images the last of which is no file."""
    make(images(folder, 1, 2, 3, 4, 5) / "6.png")
    return folder


# What each is made by, and what is said of it. All are asked for 6 frames.
CORPUS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty.mp4": (Path.touch, "is empty"),
    "wrong-suffix.avi": (mp4, READ),
    "no-suffix": (lambda path: mp4(path.with_suffix(".mp4")).rename(path), READ),
    "cut.mp4": (lambda path: path.write_bytes(mp4(path).read_bytes()[:1500]), "not a video that can be read"),
    "sound.mp4": (sound, "has no video stream"),
    "one-frame.mp4": (lambda path: video(path, moving_square(1)), "has 1 frames, but 6 are needed"),
    "odd.mp4": (lambda path: video(path, moving_square(6, 63, 95), pixels="yuv444p"), READ),
    "ten-bit.mp4": (lambda path: video(path, moving_square(), pixels="yuv420p10le"), READ),
    "variable-rate.mp4": (lambda path: video(path, moving_square(), times=[0, 10, 500, 510, 1000, 3000]), READ),
    "ffv1.mkv": (lambda path: video(path, moving_square(), codec="ffv1"), READ),
    "8k-in-the-header.mp4": (lambda path: lying_size(path, 7680, 4320), READ),
    "64k-in-the-header.mp4": (lambda path: lying_size(path, 65535, 65535), READ),
    "billions-of-samples.mp4": (lambda path: patched(path, b"stsz", 12, b"\x7f\xff\xff\xff"), "not a video that can"),
    # It crashes decord; PyAV reads it.
    "billions-of-times.mp4": (lambda path: patched(path, b"stts", 12, b"\x7f\xff\xff\xff"), READ),
    "terabyte-of-nothing.mp4": (sparse, "not a video that can be read"),
    "concat.mp4": (lambda path: text(path, "ffconcat version 1.0\nfile other.mp4\n"), "is a playlist"),
    "hls.mp4": (lambda path: text(path, "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.mp4\n"), "is a playlist"),
    "dash.mp4": (lambda path: text(path, '<?xml version="1.0"?>\n<MPD type="static"></MPD>'), "is a playlist"),
    "session.mp4": (lambda path: text(path, "v=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n"), "not a video that"),
    "pipe.mp4": (os.mkfifo, "neither a file nor a folder"),
    "zero.mp4": (lambda path: path.symlink_to("/dev/zero"), "neither a file nor a folder"),
    "loop.mp4": (lambda path: path.symlink_to(path.name), "no such file"),
    "large.gif": (lambda path: gif_of_one_size(path, 65535, 65535), "cannot be read (DecompressionBombError: "),
    "gap": (lambda path: images(path, 1, 2, 3, 5, 6, 7), "image number 4 is missing between 3.png and 5.png"),
    "far-apart": (lambda path: images(path, 1, 10**20), f"image number 2 is missing between 1.png and {10**20}.png"),
    "mixed": (
        lambda path: Image.new("RGB", (32, 32)).save(images(path, 1, 2, 3, 4, 5) / "6.png"),
        "6.png is 32x32, the ones before are 96x64",
    ),
    "bomb": (lambda path: with_special(path, lambda last: png(last, 60000, 60000)), "6.png: not an image that can be"),
    "small-bomb": (lambda path: with_special(path, lambda last: png(last, 9000, 9000)), "its frames are 9000x9000; at"),
    "pipe-in-a-folder": (lambda path: with_special(path, os.mkfifo), "6.png is not a file"),
    "zero-in-a-folder": (
        lambda path: with_special(path, lambda last: last.symlink_to("/dev/zero")),
        "6.png is not a f",
    ),
    "loop-in-a-folder": (lambda path: with_special(path, lambda last: last.symlink_to(last.name)), "6.png is not a f"),
    "folder-in-itself": (lambda path: (images(path, *range(1, 7)) / "again").symlink_to("."), READ),
}


def outcome(path: Path, **limits: float) -> str:
    try:
        frames, fps = read_frames(path, decode(), **{"seconds": SECONDS} | limits)
    except TavError as error:
        assert str(error).startswith(f"{path}: ") and str(error).isprintable() and len(str(error)) < 400
        return str(error).removeprefix(f"{path}: ")
    assert frames.shape == (6, 64, 64, 3) and frames.dtype == np.uint8 and fps >= 1
    return READ


@pytest.mark.parametrize("name", CORPUS)
def test_each_of_the_corpus_is_read_or_refused(tmp_path: Path, name: str) -> None:
    make, said = CORPUS[name]
    make(tmp_path / name)
    assert outcome(tmp_path / name).startswith(said)


def test_an_image_is_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow starts Ghostscript for PostScript, whatever the file is called."""
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    header = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 96 64\n%%EndComments\nshowpage\n"
    folder = with_special(tmp_path / "images", lambda last: text(last, header))
    assert outcome(folder).startswith("6.png: not an image that can be read")
    assert not (tmp_path / "started").exists()


# The limits


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip.mp4", pytest.param("clip", marks=pytest.mark.long)])
def test_no_more_memory_than_allowed(tmp_path: Path, name: str) -> None:
    if name.endswith("mp4"):
        path = tmp_path / name
        write_video(path, moving_square(16), Fraction(12))
    else:
        path = images(tmp_path / name, *range(16))
    large = decode(width=4096, height=4096, frames=16)  # 800 MB
    with pytest.raises(TavError, match="needs more memory than is allowed"):
        read_frames(path, large, SECONDS, memory=700 * 2**20)


def executable(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "seconds"), [("exec sleep 600", 10), ("kill -SEGV $$", 60)])
def test_another_decoder_has_a_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, seconds: float) -> None:
    clip = mp4(tmp_path / "clip.mp4")
    script = f'case "$*" in *decord*) {fault};; *) exec {sys.executable} "$@";; esac'
    monkeypatch.setattr(sys, "executable", executable(tmp_path / "python", script))
    assert outcome(clip, seconds=seconds) == READ


def test_a_decoder_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = mp4(tmp_path / "clip.mp4")
    monkeypatch.setattr(sys, "executable", executable(tmp_path / "python", f"echo $$ > {tmp_path}/id; exec sleep 600"))
    begin = time.monotonic()
    assert outcome(clip, seconds=1).startswith("reading it took more than 1 s")
    assert time.monotonic() - begin < 20
    assert not Path(f"/proc/{int((tmp_path / 'id').read_text())}").exists()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_decoder_that_talks_without_end_fills_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: str
) -> None:
    clip = mp4(tmp_path / "clip.mp4")
    monkeypatch.setattr(sys, "executable", executable(tmp_path / "python", f"exec yes > /dev/{stream}"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert outcome(clip, seconds=1).startswith("reading it took more than 1 s")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10  # KiB


def test_a_decoder_that_nobody_waits_for_ends_itself(tmp_path: Path) -> None:
    """As where the parent was killed."""
    script = (
        "import time\n"
        "from tav.media import decoder_process\n"
        "decoder_process.read_source = lambda *arguments: time.sleep(600)\n"
        "decoder_process.main()\n"
    )
    settings = {"reader": "av", "seconds": 0.5, "memory": 2**33, "decode": decode().model_dump(), "audio": False}
    child = subprocess.run(
        [sys.executable, "-c", script, "clip.mp4", str(tmp_path), json.dumps(settings)], cwd=ROOT, timeout=60
    )
    assert child.returncode == -signal.SIGALRM
