"""Frames out of a file that nobody vouches for: read in a process of its own, bounded in time and memory.

Decoders hang or crash on some broken files. Here that ends the child process; another decoder then has a try, and where
that one does no better, the parent says so in one line.
"""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tav.config import DecodeParams
from tav.media.frame_selection import fit_image, playback_rate, select_frames
from tav_model.disk_space import explained_full_disk
from tav_model.errors import FullDiskError, TavError

if TYPE_CHECKING:
    import av
    import numpy as np
    from PIL import Image

SECONDS = 600
MEMORY = 8 * 2**30
MAX_PIXELS = 8192 * 8192
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# What Pillow may take such a file for. It knows more formats, and starts Ghostscript for one of them.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
FOLDER_FPS = Fraction(8)
# Texts that make FFmpeg open other files, which neither digest nor DVC would see. It finds the last two further in.
PLAYLISTS = (b"ffconcat", b"#extm3u")
PLAYLIST_MARKS = (b"<mpd", b"<compositionplaylist")
HEAD = 2**16
# In this order; the second where the first has crashed, or hung for half of the time.
READERS = ("decord", "av")
# What the child leaves.
FRAMES, ANSWER = "frames.npy", "answer.json"


def read_frames(
    source: Path, decode: DecodeParams, seconds: float = SECONDS, memory: int = MEMORY
) -> tuple[np.ndarray, Fraction]:
    """The selected frames, `f h w 3` in uint8, and the rate at which they play; turned upright where the file says how.

    Args:
        source: a video that decord reads (or PyAV, where decord cannot), an animated GIF, or a folder of numbered images.
        seconds: after which the reading is given up.
        memory: that the reading process may address, in bytes.

    Raises:
        TavError: missing, not a video, broken, too short, too large, or a folder with a gap or with mixed sizes.
        FullDiskError: the system's folder for temporary files has no room for the frames.
    """
    import numpy as np

    if not os.path.exists(source):  # Path.exists raises for names that are too long.
        raise TavError(f"{source}: no such file")
    if not (os.path.isfile(source) or os.path.isdir(source)):
        raise TavError(f"{source}: neither a file nor a folder")
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="tav-") as folder:
        readers = READERS if os.path.isfile(source) else READERS[-1:]
        for left, reader in zip(range(len(readers), 0, -1), readers, strict=True):
            share = max((deadline - time.monotonic()) / left, 0.01)
            status = _run_child(source, Path(folder), decode, reader, share, memory)
            answer = _answer(Path(folder))
            if "no room" in answer:
                raise FullDiskError(*answer["no room"], tempfile.gettempdir())
            if "error" in answer:
                raise TavError(f"{source}: {answer['error']}")
            if "fps" in answer:
                return np.load(Path(folder) / FRAMES, allow_pickle=False), Fraction(answer["fps"])
    if status is None:
        raise TavError(f"{source}: reading it took more than {seconds:g} s; the file is broken or too long")
    how = f"signal {-status}" if status < 0 else f"status {status}"
    raise TavError(f"{source}: cannot be read: the decoder crashed on it ({how})")


def _run_child(
    source: Path, folder: Path, decode: DecodeParams, reader: str, seconds: float, memory: int
) -> int | None:
    """The status with which the child ended; None where it had to be ended."""
    settings = {"reader": reader, "seconds": seconds, "memory": memory, "decode": decode.model_dump()}
    command = [sys.executable, "-m", "tav.media.decoding", str(source), str(folder), json.dumps(settings)]
    # Decoders write a line for each broken block, which may be gigabytes.
    nothing = subprocess.DEVNULL
    try:
        return subprocess.run(command, timeout=seconds, stdin=nothing, stdout=nothing, stderr=nothing).returncode
    except subprocess.TimeoutExpired:
        return None


def _answer(folder: Path) -> dict[str, Any]:
    """What the child has left; nothing where it crashed before or while it wrote."""
    try:
        return json.loads((folder / ANSWER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


# In the child


def _read(source: Path, decode: DecodeParams, reader: str) -> tuple[np.ndarray, Fraction]:
    if source.is_dir():
        return _read_folder(source, decode)
    if source.stat().st_size == 0:
        raise TavError("is empty")
    with source.open("rb") as file:
        head = file.read(HEAD)
    if head.startswith((b"GIF87a", b"GIF89a")):
        return _read_gif(source, decode)
    text = head.partition(b"\0")[0].lower()
    if text.startswith(PLAYLISTS) or any(mark in text for mark in PLAYLIST_MARKS):
        raise TavError("is a playlist, a list of other files; give the video itself")
    first: Exception | None = None
    if reader == "decord":
        try:
            return _read_decord(source, decode)
        except TavError:
            raise
        except Exception as error:
            first = error
    try:
        return _read_av(source, decode)
    except (TavError, MemoryError):
        raise
    except Exception as error:
        # EAGAIN: no room for a thread's stack. Where decord has run out of memory, PyAV may not even load.
        if isinstance(first, MemoryError) or getattr(error, "errno", None) in (errno.ENOMEM, errno.EAGAIN):
            raise MemoryError from None
        why = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(first or error).__name__
        raise TavError(f"not a video that can be read ({why})") from None


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise TavError(f"its frames are {width}x{height}; at most {MAX_PIXELS} pixels are allowed")


def _read_decord(source: Path, decode: DecodeParams) -> tuple[np.ndarray, Fraction]:
    """Decord turns the frames upright by itself."""
    import decord
    import numpy as np
    from PIL import Image

    video = decord.VideoReader(str(source), num_threads=1)
    indexes = select_frames(decode, len(video))
    frames = []
    for index in indexes:
        frame = video[index].asnumpy()
        _check_size(frame.shape[1], frame.shape[0])
        frames.append(fit_image(Image.fromarray(frame), decode))
    rate = Fraction(video.get_avg_fps()).limit_denominator(1001)
    return np.stack(frames), playback_rate(rate, indexes)


def _read_av(source: Path, decode: DecodeParams) -> tuple[np.ndarray, Fraction]:
    """In two passes: how many frames there are, then those selected. PyAV leaves turning them upright to us."""
    import av

    with av.open(str(source)) as container:
        if not container.streams.video:
            raise TavError("has no video in it")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise TavError("its video is in a format that cannot be read")
        _check_size(stream.codec_context.width, stream.codec_context.height)
        rate = Fraction(stream.average_rate or stream.guessed_rate or FOLDER_FPS)
        available = sum(1 for _ in container.decode(stream))
    indexes = select_frames(decode, available)
    with av.open(str(source)) as container:
        frames = container.decode(video=0)
        return _select(frames, indexes, _upright, decode), playback_rate(rate, indexes)


def _upright(frame: av.VideoFrame) -> Image.Image:
    _check_size(frame.width, frame.height)  # The header may have said another.
    return frame.to_image().rotate(frame.rotation, expand=True)


def _read_gif(source: Path, decode: DecodeParams) -> tuple[np.ndarray, Fraction]:
    from PIL import Image, ImageSequence

    with Image.open(source, formats=("GIF",)) as image:
        _check_size(*image.size)
        available = getattr(image, "n_frames", 1)
        indexes = select_frames(decode, available)
        milliseconds = 0
        for frame in range(available):
            image.seek(frame)
            milliseconds += image.info.get("duration", 100) or 100
        rate = Fraction(1000 * available, milliseconds)
        frames = ImageSequence.Iterator(image)
        return _select(frames, indexes, lambda frame: frame, decode), playback_rate(rate, indexes)


def _select(
    frames: Iterable[Any], indexes: list[int], image: Callable[[Any], Image.Image], decode: DecodeParams
) -> np.ndarray:
    """The frames at `indexes`, resized; nothing is done to the others, and nothing read after the last."""
    import numpy as np

    wanted = set(indexes)
    first_frames = enumerate(islice(frames, indexes[-1] + 1))
    return np.stack([fit_image(image(frame), decode) for index, frame in first_frames if index in wanted])


def _read_folder(source: Path, decode: DecodeParams) -> tuple[np.ndarray, Fraction]:
    import numpy as np
    from PIL import Image, ImageOps

    numbered: dict[int, Path] = {}
    for path in sorted(source.iterdir()):
        if path.suffix.lower() not in IMAGES or path.name.startswith("."):
            continue
        if not path.is_file():
            raise TavError(f"{path.name} is not a file")
        digits = re.findall(r"\d+", path.stem)
        if not digits:
            raise TavError(f"{path.name} has no number in its name")
        other = numbered.setdefault(int(digits[-1]), path)
        if other != path:
            raise TavError(f"{other.name} and {path.name} have the same number")
    if not numbered:
        raise TavError(f"no images in the folder ({', '.join(IMAGES)})")
    for before, after in pairwise(sorted(numbered)):
        if after != before + 1:
            raise TavError(
                f"image number {before + 1} is missing between {numbered[before].name} and {numbered[after].name}"
            )
    wanted = set(select_frames(decode, len(numbered)))
    frames, size = [], None
    for index, number in enumerate(sorted(numbered)):
        path = numbered[number]
        try:
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                _check_size(*image.size)
                if size not in (None, image.size):
                    raise TavError(
                        f"{path.name} is {image.size[0]}x{image.size[1]}, the ones before are {size[0]}x{size[1]}"
                    )
                size = image.size
                if image.mode.startswith(("I", "F")):  # Pillow would show all above 255 as white.
                    raise TavError(f"{path.name} has more than 8 bits a colour; only 8 are allowed")
                if index in wanted:
                    frames.append(fit_image(ImageOps.exif_transpose(image), decode))
        except (TavError, MemoryError):
            raise
        except Exception as error:  # On broken images, Pillow fails in any way it happens to.
            raise TavError(f"{path.name}: not an image that can be read ({_first_line(error)})") from None
    return np.stack(frames), playback_rate(FOLDER_FPS, sorted(wanted))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _limit(kind: int, most: int) -> None:
    """Lower a limit of this process; one that the user has set lower stays."""
    lower = [limit for limit in resource.getrlimit(kind) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(kind, (min([most, *lower]),) * 2)


def main() -> int:
    source, folder, settings = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    # The parent ends this process in time, unless it has been killed itself.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, settings["seconds"] + 1)
    _limit(resource.RLIMIT_AS, settings["memory"])
    _limit(resource.RLIMIT_FSIZE, settings["memory"])
    _limit(resource.RLIMIT_CORE, 0)
    import numpy as np

    answer: dict[str, Any]
    try:
        frames, fps = _read(source, DecodeParams(**settings["decode"]), settings["reader"])
        with explained_full_disk(folder / FRAMES), (folder / FRAMES).open("wb") as file:
            # Not by np.save, whose errors do not say that the disk is full.
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(frames))
            file.write(np.ascontiguousarray(frames).data)
        answer = {"fps": str(fps)}
    except FullDiskError as error:
        (folder / FRAMES).unlink(missing_ok=True)  # The answer needs room, too.
        answer = {"no room": [error.errno, error.strerror]}
    except TavError as error:
        answer = {"error": str(error)}
    except MemoryError:
        answer = {"error": "needs more memory than is allowed for reading a video"}
    except Exception as error:  # Whatever a decoder or an image library raises on broken files.
        answer = {"error": f"cannot be read ({type(error).__name__}: {_first_line(error)})"}
    (folder / ANSWER).write_text(json.dumps(answer), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
