"""Read frames from untrusted video in a child process that is limited in time and memory.

Decoders hang or crash on some broken files. In a child process that does no harm: another decoder is tried, and if that
one fails too, the error is one line.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tav.media.decoder_process import ANSWER_FILE, AUDIO_FILE, FRAMES_FILE
from tav_model.errors import FullDiskError, TavError

if TYPE_CHECKING:
    import numpy as np

    from tav.config import DecodeParams

logger = logging.getLogger(__name__)

SECONDS = 600
MEMORY = 8 * 2**30
# Tried in this order: the second after the first has crashed, or hung for half of the time.
READERS = ("decord", "av")


class Frames(NamedTuple):
    """Frames that were read from a video.

    Attributes:
        frames: the selected ones at the size that was asked for, `f h w 3` in uint8.
        fps: the rate at which they play, in frames per second.
        available: how many frames the video has.
        size: width and height of its frames in pixels, upright.
    """

    frames: np.ndarray
    fps: Fraction
    available: int
    size: tuple[int, int]


class DecodedFrames:
    """Frames in a file, of which only those that are asked for are read: `f h w 3` in uint8.

    Attributes:
        shape: (f, h, w, 3).
        fps: the frame rate, in frames per second, at which they play.
        available: how many frames the video has.
        size: width and height of its frames in pixels, upright.
        audio: the video's audio as AAC in an MP4, where the frames are all of the video, at its own rate; None without.
    """

    def __init__(
        self, path: Path, fps: Fraction, available: int, size: tuple[int, int], audio: Path | None = None
    ) -> None:
        import numpy as np

        self._path, self.fps, self.audio = path, fps, audio
        self.available, self.size = available, size
        self.shape: tuple[int, ...] = np.load(path, mmap_mode="r", allow_pickle=False).shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice) -> np.ndarray:
        import numpy as np

        # A map of its own for each part: pages that were read count as memory of the process until it is closed.
        return np.array(np.load(self._path, mmap_mode="r", allow_pickle=False)[part])


def read_frames(
    source: Path, decode: DecodeParams, seconds: float = SECONDS, memory: int = MEMORY
) -> tuple[np.ndarray, Fraction]:
    """Return the selected frames, `f h w 3` in uint8, and their frame rate: `decoded_frames`, all in memory."""
    with decoded_frames(source, decode, seconds, memory) as frames:
        return frames[:], frames.fps


def read_measured_frames(source: Path, decode: DecodeParams) -> Frames:
    """Return the selected frames, and how many the video has at which size: `decoded_frames`, all in memory."""
    with decoded_frames(source, decode) as frames:
        return Frames(frames[:], frames.fps, frames.available, frames.size)


@contextlib.contextmanager
def decoded_frames(
    source: Path, decode: DecodeParams, seconds: float = SECONDS, memory: int = MEMORY, audio: bool = False
) -> Iterator[DecodedFrames]:
    """Decode the selected frames, and yield them. They are in a temporary file, which is removed afterwards.

    The rotation that a file specifies is applied.

    Args:
        source: a video that decord or PyAV reads, an animated GIF, or a folder of numbered images.
        decode: which frames, and their size.
        seconds: time limit.
        memory: limit of the child process's address space and files, in bytes.
        audio: whether audio is extracted, too.

    Raises:
        TavError: missing, not a video, broken, too short, too large, or a folder with a gap or with mixed sizes.
        FullDiskError: the system's folder for temporary files has no space for the frames.
    """
    if not os.path.exists(source):  # Path.exists raises an error for names that are too long.
        raise TavError(f"{source}: no such file")
    if not (os.path.isfile(source) or os.path.isdir(source)):
        raise TavError(f"{source}: neither a file nor a folder")
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="tav-") as folder:
        readers = READERS if os.path.isfile(source) else READERS[-1:]
        for untried, reader in zip(range(len(readers), 0, -1), readers, strict=True):
            share = max((deadline - time.monotonic()) / untried, 0.01)
            status = _run_decoder(source, Path(folder), decode, reader, share, memory, audio)
            answer = _read_answer(Path(folder))
            if "full_disk" in answer:
                raise FullDiskError(*answer["full_disk"], tempfile.gettempdir())
            if "error" in answer:
                raise TavError(f"{source}: {answer['error']}")
            if "fps" in answer:
                if "no_audio" in answer:
                    logger.warning("%s: its audio cannot be read: %s", source, answer["no_audio"])
                sound = Path(folder) / AUDIO_FILE
                width, height = answer["size"]
                yield DecodedFrames(
                    Path(folder) / FRAMES_FILE,
                    Fraction(answer["fps"]),
                    answer["available"],
                    (width, height),
                    sound if sound.exists() else None,
                )
                return
    if status is None:
        raise TavError(f"{source}: reading it took more than {seconds:g} s; the file is broken or too long")
    how = f"signal {-status}" if status < 0 else f"status {status}"
    raise TavError(f"{source}: cannot be read: the decoder crashed on it ({how})")


def _run_decoder(
    source: Path, folder: Path, decode: DecodeParams, reader: str, seconds: float, memory: int, audio: bool
) -> int | None:
    """Run the decoder process, and return its exit status, or None where it exceeded the time limit."""
    settings = {"reader": reader, "seconds": seconds, "memory": memory, "decode": decode.model_dump(), "audio": audio}
    command = [sys.executable, "-m", "tav.media.decoder_process", str(source), str(folder), json.dumps(settings)]
    # Decoders print a line for each broken block, which may add up to gigabytes.
    silent = subprocess.DEVNULL
    try:
        return subprocess.run(command, timeout=seconds, stdin=silent, stdout=silent, stderr=silent).returncode
    except subprocess.TimeoutExpired:
        return None


def _read_answer(folder: Path) -> dict[str, Any]:
    """Return the answer of the decoder process, or an empty mapping where it crashed before it had written one."""
    try:
        return json.loads((folder / ANSWER_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
