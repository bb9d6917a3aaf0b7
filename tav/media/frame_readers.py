"""Read the selected frames of a video, an animated GIF or a folder of images.

Only the decoder process calls these functions: decoders may hang, crash or use up the memory on a broken file.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tav.media.frame_selection import fit_image, select_frames
from tav_model.errors import TavError, first_line
from tav_model.video import playback_rate

if TYPE_CHECKING:
    import av
    import numpy as np
    from PIL import Image

    from tav.config import DecodeParams

MAX_PIXELS = 8192 * 8192
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# The formats that Pillow may detect in such a file. It supports more, and starts Ghostscript for one of them.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
FOLDER_FPS = Fraction(8)
# Playlists make FFmpeg open other files, which neither a digest nor DVC covers. FFmpeg recognizes a playlist by its
# first bytes, or by a mark further in.
PLAYLIST_STARTS = (b"ffconcat", b"#extm3u")
PLAYLIST_MARKS = (b"<mpd", b"<compositionplaylist")
HEAD_BYTES = 2**16


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


def read_source(source: Path, decode: DecodeParams, reader: str) -> Frames:
    """Return the selected frames.

    Args:
        source: a video, an animated GIF, or a folder of numbered images.
        decode: which frames, and their size.
        reader: "decord": decord, and PyAV where decord reports an error; "av": only PyAV.

    Raises:
        TavError: not a video, broken, too short or too large; a message without the file's name.
        MemoryError: it needs more memory than the process may use.
    """
    if source.is_dir():
        return _read_folder(source, decode)
    if source.stat().st_size == 0:
        raise TavError("is empty")
    with source.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if head.startswith((b"GIF87a", b"GIF89a")):
        return _read_gif(source, decode)
    text = head.partition(b"\0")[0].lower()
    if text.startswith(PLAYLIST_STARTS) or any(mark in text for mark in PLAYLIST_MARKS):
        raise TavError("is a playlist, a list of other files; use the video itself")
    out_of_memory = False
    if reader == "decord":
        try:
            return _read_decord(source, decode)
        except TavError:
            raise
        except Exception as error:  # PyAV is tried next, and reports what is wrong with the file.
            out_of_memory = isinstance(error, MemoryError)
    try:
        return _read_av(source, decode)
    except (TavError, MemoryError):
        raise
    except Exception as error:
        # EAGAIN: no memory for a thread's stack. After decord has run out of memory, PyAV may even fail to load.
        if out_of_memory or getattr(error, "errno", None) in (errno.ENOMEM, errno.EAGAIN):
            raise MemoryError from None
        why = getattr(error, "strerror", None) or first_line(error)
        raise TavError(f"not a video that can be read ({why})") from None


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise TavError(f"its frames are {width}x{height}; at most {MAX_PIXELS} pixels are allowed")


def _read_decord(source: Path, decode: DecodeParams) -> Frames:
    """Read with decord, which applies the rotation that the file specifies."""
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
    height, width = frame.shape[:2]
    return Frames(np.stack(frames), playback_rate(rate, indexes), len(video), (width, height))


def _read_av(source: Path, decode: DecodeParams) -> Frames:
    """Read with PyAV in two passes: count the frames, then convert the selected ones and apply their rotation."""
    import av

    with av.open(str(source)) as container:
        if not container.streams.video:
            raise TavError("has no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise TavError("its video is in a format that cannot be read")
        _check_size(stream.codec_context.width, stream.codec_context.height)
        rate = Fraction(stream.average_rate or stream.guessed_rate or FOLDER_FPS)
        available = sum(1 for _ in container.decode(stream))
    indexes = select_frames(decode, available)
    with av.open(str(source)) as container:
        frames = container.decode(video=0)
        selected, size = _select(frames, indexes, _upright, decode)
        return Frames(selected, playback_rate(rate, indexes), available, size)


def _upright(frame: av.VideoFrame) -> Image.Image:
    _check_size(frame.width, frame.height)  # The header may have specified another size.
    return frame.to_image().rotate(frame.rotation, expand=True)


def _read_gif(source: Path, decode: DecodeParams) -> Frames:
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
        selected, size = _select(frames, indexes, lambda frame: frame, decode)
        return Frames(selected, playback_rate(rate, indexes), available, size)


def _select(
    frames: Iterable[Any], indexes: list[int], image: Callable[[Any], Image.Image], decode: DecodeParams
) -> tuple[np.ndarray, tuple[int, int]]:
    """Return the frames at `indexes`, resized, and their size before.

    Other frames are not converted; reading stops after the last index.
    """
    import numpy as np

    selected, size, wanted = [], (0, 0), set(indexes)
    for index, frame in enumerate(islice(frames, indexes[-1] + 1)):
        if index in wanted:
            picture = image(frame)
            size = picture.size
            selected.append(fit_image(picture, decode))
    return np.stack(selected), size


def _read_folder(source: Path, decode: DecodeParams) -> Frames:
    import numpy as np
    from PIL import Image, ImageOps

    numbered: dict[int, Path] = {}
    for path in sorted(source.iterdir()):
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
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
        raise TavError(f"no images in the folder ({', '.join(IMAGE_SUFFIXES)})")
    for before, after in pairwise(sorted(numbered)):
        if after != before + 1:
            raise TavError(
                f"image number {before + 1} is missing between {numbered[before].name} and {numbered[after].name}"
            )
    selected = set(select_frames(decode, len(numbered)))
    frames: list[np.ndarray] = []
    size: tuple[int, int] | None = None
    upright = (0, 0)
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
                if image.mode.startswith(("I", "F")):  # Pillow would clip all values above 255 to white.
                    raise TavError(f"{path.name} has more than 8 bits per channel; only 8 are allowed")
                if index in selected:
                    picture = ImageOps.exif_transpose(image)
                    upright = picture.size
                    frames.append(fit_image(picture, decode))
        except (TavError, MemoryError):
            raise
        except Exception as error:  # Pillow raises errors of many types on broken images.
            raise TavError(f"{path.name}: not an image that can be read ({first_line(error)})") from None
    return Frames(np.stack(frames), playback_rate(FOLDER_FPS, sorted(selected)), len(numbered), upright)
