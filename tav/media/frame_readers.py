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
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tav.media.frame_selection import fit_image, select_frames
from tav_model.errors import FullDiskError, TavError, first_line
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
AUDIO_RATES = (16000, 22050, 32000, 44100, 48000)  # hertz, that all players support


class FrameSink(Protocol):
    """Where frames go, one by one, so that they need not fit into memory."""

    def start(self, count: int) -> None:
        """Begin, with the number of frames to come; those received before are dropped."""

    def add(self, frame: np.ndarray) -> None:
        """Receive the next frame, `h w 3` in uint8."""


class Selection(NamedTuple):
    """What was read of a source.

    Attributes:
        fps: the frame rate at which the selected frames play.
        available: how many frames the source has.
        size: width and height of its frames in pixels, upright.
        complete: whether the selected frames are all frames of a video file, at its own rate.
    """

    fps: Fraction
    available: int
    size: tuple[int, int]
    complete: bool = False


def read_source(source: Path, decode: DecodeParams, reader: str, sink: FrameSink) -> Selection:
    """Pass the selected frames to `sink`, in order.

    Args:
        source: a video, an animated GIF, or a folder of numbered images.
        decode: which frames, and their size.
        reader: "decord": decord, and PyAV where decord reports an error; "av": only PyAV.
        sink: receives the frames; from the first again where another reader is tried.

    Raises:
        TavError: not a video, broken, too short or too large; a message without the file's name.
        FullDiskError: the sink has no space for them.
        MemoryError: it needs more memory than the process may use.
    """
    if source.is_dir():
        return _read_folder(source, decode, sink)
    if source.stat().st_size == 0:
        raise TavError("is empty")
    with source.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if head.startswith((b"GIF87a", b"GIF89a")):
        return _read_gif(source, decode, sink)
    text = head.partition(b"\0")[0].lower()
    if text.startswith(PLAYLIST_STARTS) or any(mark in text for mark in PLAYLIST_MARKS):
        raise TavError("is a playlist, a list of other files; use the video itself")
    out_of_memory = False
    if reader == "decord":
        try:
            return _read_decord(source, decode, sink)
        except (TavError, FullDiskError):
            raise
        except Exception as error:  # PyAV is tried next, and reports what is wrong with the file.
            out_of_memory = isinstance(error, MemoryError)
    try:
        return _read_av(source, decode, sink)
    except (TavError, FullDiskError, MemoryError):
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


def _read_decord(source: Path, decode: DecodeParams, sink: FrameSink) -> Selection:
    """Read with decord, which applies the rotation that the file specifies."""
    import decord
    from PIL import Image

    video = decord.VideoReader(str(source), num_threads=1)
    indexes = select_frames(decode, len(video))
    sink.start(len(indexes))
    for index in indexes:
        frame = video[index].asnumpy()
        _check_size(frame.shape[1], frame.shape[0])
        sink.add(fit_image(Image.fromarray(frame), decode))
    rate = Fraction(video.get_avg_fps()).limit_denominator(1001)
    size = (frame.shape[1], frame.shape[0])
    return Selection(playback_rate(rate, indexes), len(video), size, len(indexes) == len(video))


def _read_av(source: Path, decode: DecodeParams, sink: FrameSink) -> Selection:
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
        size = _select(frames, indexes, _upright, decode, sink)
    return Selection(playback_rate(rate, indexes), available, size, len(indexes) == available)


def _upright(frame: av.VideoFrame) -> Image.Image:
    _check_size(frame.width, frame.height)  # The header may have specified another size.
    return frame.to_image().rotate(frame.rotation, expand=True)


def _read_gif(source: Path, decode: DecodeParams, sink: FrameSink) -> Selection:
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
        size = _select(frames, indexes, lambda frame: frame, decode, sink)
        return Selection(playback_rate(rate, indexes), available, size)


def _select(
    frames: Iterable[Any],
    indexes: list[int],
    image: Callable[[Any], Image.Image],
    decode: DecodeParams,
    sink: FrameSink,
) -> tuple[int, int]:
    """Pass on the frames at `indexes`, resized, and return their size before.

    Other frames are not converted; reading stops after the last index.
    """
    selected, size = set(indexes), (0, 0)
    sink.start(len(indexes))
    for index, frame in enumerate(islice(frames, indexes[-1] + 1)):
        if index in selected:
            picture = image(frame)
            size = picture.size
            sink.add(fit_image(picture, decode))
    return size


def _read_folder(source: Path, decode: DecodeParams, sink: FrameSink) -> Selection:
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
    sink.start(len(selected))
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
                    sink.add(fit_image(picture, decode))
        except (TavError, FullDiskError, MemoryError):
            raise
        except Exception as error:  # Pillow raises errors of many types on broken images.
            raise TavError(f"{path.name}: not an image that can be read ({first_line(error)})") from None
    return Selection(playback_rate(FOLDER_FPS, sorted(selected)), len(numbered), upright)


def extract_audio(source: Path, target: Path) -> bool:
    """Write the first audio stream of a video as AAC in an MP4; return whether the video has any.

    Times count from the start of the video, as they do in the source.
    """
    import av

    with av.open(str(source)) as container:
        if not container.streams.audio or not container.streams.video:
            return False
        stream = container.streams.audio[0]
        rate = min(AUDIO_RATES, key=lambda one: abs(one - stream.rate))
        layout = "mono" if stream.channels == 1 else "stereo"
        with av.open(str(target), "w", format="mp4") as out:
            encoded = out.add_stream("aac", rate=rate, layout=layout)
            resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate)
            for frame in container.decode(stream):
                for resampled in resampler.resample(frame):
                    out.mux(encoded.encode(resampled))
            for resampled in resampler.resample(None):
                out.mux(encoded.encode(resampled))
            out.mux(encoded.encode(None))
    return True
