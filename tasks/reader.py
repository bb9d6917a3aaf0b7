"""Frames out of a file that nobody vouches for: read in a process of its own, bounded in time and memory.

Decoders hang or crash on some broken files. Here that ends the child process, and the parent says so in one line.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tav_model.errors import FullDiskError, TavError
from tav_model.files import explained_full_disk

if TYPE_CHECKING:
    import av
    import numpy as np
    from PIL import Image

SECONDS = 600
MEMORY = 8 * 2**30
MAX_PIXELS = 8192 * 8192
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
FOLDER_FPS = Fraction(8)
# Texts that make FFmpeg open other files, which neither digest nor DVC would see.
PLAYLISTS = (b"ffconcat", b"#EXTM3U")


@dataclass(frozen=True)
class Selection:
    """Which frames, and how large: the section `decode` of params.yaml."""

    frames: int
    width: int
    height: int
    fit: str
    sampling: str
    start: int
    stride: int
    end: int | None

    def indexes(self, available: int) -> list[int]:
        """The frames to take out of `available`.

        Raises:
            TavError: there are fewer than asked for.
        """
        end = available if self.end is None else min(self.end, available)
        span = end - self.start
        needed = self.frames if self.sampling == "uniform" else (self.frames - 1) * self.stride + 1
        if span < needed:
            part = f", {max(span, 0)} of them from decode.start {self.start}" if self.start or end < available else ""
            raise TavError(
                f"has {available} frames{part}, but {needed} are needed for decode.frames {self.frames}"
                f"{f' at decode.stride {self.stride}' if self.sampling == 'stride' else ''}; ask for fewer"
            )
        if self.sampling == "stride":
            return [self.start + i * self.stride for i in range(self.frames)]
        if self.frames == 1:
            return [self.start]
        return [self.start + round(i * (span - 1) / (self.frames - 1)) for i in range(self.frames)]

    def fps(self, source: Fraction, indexes: list[int]) -> Fraction:
        """The rate at which the selected frames play as fast as the source does; at least 1."""
        if len(indexes) < 2:
            return source
        return max(Fraction(1), source * (len(indexes) - 1) / (indexes[-1] - indexes[0]))

    def resized(self, image: Image.Image) -> np.ndarray:
        """An image as `height width 3`, by this selection's fit."""
        import numpy as np
        from PIL import Image, ImageOps

        image, size = image.convert("RGB"), (self.width, self.height)
        if self.fit == "crop":
            image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
        elif self.fit == "pad":
            image = ImageOps.pad(image, size, Image.Resampling.LANCZOS, color="black")
        else:
            image = image.resize(size, Image.Resampling.LANCZOS)
        return np.asarray(image)


def read_frames(source: Path, selection: Selection, seconds: float = SECONDS) -> tuple[np.ndarray, Fraction]:
    """The selected frames, `f h w 3` in uint8, and the rate at which they play; turned upright where the file says how.

    Args:
        source: a video that decord reads (or PyAV, where decord cannot), an animated GIF, or a folder of numbered images.
        seconds: after which the reading is given up.

    Raises:
        TavError: missing, not a video, broken, too short, too large, or a folder with a gap or with mixed sizes.
        FullDiskError: the system's folder for temporary files has no room for the frames.
    """
    import numpy as np

    if not os.path.exists(source):  # Path.exists raises for names that are too long.
        raise TavError(f"{source}: no such file")
    with tempfile.TemporaryDirectory(prefix="tav-") as folder:
        out = Path(folder) / "frames.npy"
        command = [sys.executable, "-m", "tasks.reader", str(source), str(out), json.dumps(vars(selection))]
        try:
            child = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds)
        except subprocess.TimeoutExpired:
            raise TavError(
                f"{source}: reading it took more than {seconds:g} s; the file is broken or too long"
            ) from None
        answer = _last_json(child.stdout)
        if "no room" in answer:
            raise FullDiskError(*answer["no room"], tempfile.gettempdir())
        if "error" in answer:
            raise TavError(f"{source}: {answer['error']}")
        if child.returncode or "fps" not in answer:
            how = f"signal {-child.returncode}" if child.returncode < 0 else f"status {child.returncode}"
            raise TavError(f"{source}: cannot be read: the decoder crashed on it ({how})")
        return np.load(out, allow_pickle=False), Fraction(answer["fps"])


def _last_json(text: str) -> dict[str, Any]:
    try:
        answer = json.loads(text.strip().rpartition("\n")[2])
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


# In the child


def _read(source: Path, selection: Selection) -> tuple[np.ndarray, Fraction]:
    if source.is_dir():
        return _read_folder(source, selection)
    if source.stat().st_size == 0:
        raise TavError("is empty")
    with source.open("rb") as file:
        head = file.read(8)
    if head.startswith((b"GIF87a", b"GIF89a")):
        return _read_gif(source, selection)
    if head.startswith(PLAYLISTS):
        raise TavError("is a playlist, a list of other files; give the video itself")
    try:
        return _read_decord(source, selection)
    except TavError:
        raise
    except Exception as first:
        try:
            return _read_av(source, selection)
        except TavError:
            raise
        except Exception as second:
            why = getattr(second, "strerror", None) or str(second).partition("\n")[0] or type(first).__name__
            raise TavError(f"not a video that can be read ({why})") from None


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise TavError(f"its frames are {width}x{height}; at most {MAX_PIXELS} pixels are allowed")


def _read_decord(source: Path, selection: Selection) -> tuple[np.ndarray, Fraction]:
    """Decord turns the frames upright by itself."""
    import decord
    import numpy as np
    from PIL import Image

    video = decord.VideoReader(str(source), num_threads=1)
    indexes = selection.indexes(len(video))
    frames = []
    for index in indexes:
        frame = video[index].asnumpy()
        _check_size(frame.shape[1], frame.shape[0])
        frames.append(selection.resized(Image.fromarray(frame)))
    rate = Fraction(video.get_avg_fps()).limit_denominator(1001)
    return np.stack(frames), selection.fps(rate, indexes)


def _read_av(source: Path, selection: Selection) -> tuple[np.ndarray, Fraction]:
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
    indexes = selection.indexes(available)
    with av.open(str(source)) as container:
        frames = container.decode(video=0)
        return _select(frames, indexes, _upright, selection), selection.fps(rate, indexes)


def _upright(frame: av.VideoFrame) -> Image.Image:
    return frame.to_image().rotate(frame.rotation, expand=True)


def _read_gif(source: Path, selection: Selection) -> tuple[np.ndarray, Fraction]:
    from PIL import Image, ImageSequence

    with Image.open(source) as image:
        _check_size(*image.size)
        available = getattr(image, "n_frames", 1)
        indexes = selection.indexes(available)
        milliseconds = 0
        for frame in range(available):
            image.seek(frame)
            milliseconds += image.info.get("duration", 100) or 100
        rate = Fraction(1000 * available, milliseconds)
        frames = ImageSequence.Iterator(image)
        return _select(frames, indexes, lambda frame: frame, selection), selection.fps(rate, indexes)


def _select(
    frames: Iterable[Any], indexes: list[int], image: Callable[[Any], Image.Image], selection: Selection
) -> np.ndarray:
    """The frames at `indexes`, resized; nothing is done to the others, and nothing read after the last."""
    import numpy as np

    wanted = set(indexes)
    first_frames = enumerate(islice(frames, indexes[-1] + 1))
    return np.stack([selection.resized(image(frame)) for index, frame in first_frames if index in wanted])


def _read_folder(source: Path, selection: Selection) -> tuple[np.ndarray, Fraction]:
    import numpy as np
    from PIL import Image, ImageOps

    numbered: dict[int, Path] = {}
    for path in sorted(source.iterdir()):
        if path.suffix.lower() not in IMAGES or path.name.startswith("."):
            continue
        digits = re.findall(r"\d+", path.stem)
        if not digits:
            raise TavError(f"{path.name} has no number in its name")
        other = numbered.setdefault(int(digits[-1]), path)
        if other != path:
            raise TavError(f"{other.name} and {path.name} have the same number")
    if not numbered:
        raise TavError(f"no images in the folder ({', '.join(IMAGES)})")
    first, last = min(numbered), max(numbered)
    if gaps := [number for number in range(first, last + 1) if number not in numbered]:
        raise TavError(f"image number {gaps[0]} is missing between {numbered[first].name} and {numbered[last].name}")
    wanted = set(selection.indexes(len(numbered)))
    frames, size = [], None
    for index, path in enumerate(numbered[number] for number in range(first, last + 1)):
        try:
            with Image.open(path) as image:
                _check_size(*image.size)
                if size not in (None, image.size):
                    raise TavError(
                        f"{path.name} is {image.size[0]}x{image.size[1]}, the ones before are {size[0]}x{size[1]}"
                    )
                size = image.size
                if image.mode.startswith(("I", "F")):  # Pillow would show all above 255 as white.
                    raise TavError(f"{path.name} has more than 8 bits a colour; only 8 are allowed")
                if index in wanted:
                    frames.append(selection.resized(ImageOps.exif_transpose(image)))
        except OSError as error:
            raise TavError(f"{path.name}: not an image that can be read ({error})") from None
    return np.stack(frames), selection.fps(FOLDER_FPS, sorted(wanted))


def main() -> int:
    source, out, selection = Path(sys.argv[1]), Path(sys.argv[2]), Selection(**json.loads(sys.argv[3]))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import numpy as np

    try:
        frames, fps = _read(source, selection)
        with explained_full_disk(out), out.open("wb") as file:
            # Not by np.save, whose errors do not say that the disk is full.
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(frames))
            file.write(np.ascontiguousarray(frames).data)
        answer = {"fps": str(fps)}
    except FullDiskError as error:
        answer = {"no room": [error.errno, error.strerror]}
    except TavError as error:
        answer = {"error": str(error)}
    except MemoryError:
        answer = {"error": "needs more memory than is allowed for reading a video"}
    except Exception as error:  # Whatever a decoder or an image library raises on broken files.
        answer = {"error": f"cannot be read ({type(error).__name__}: {str(error).partition(chr(10))[0]})"}
    print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
