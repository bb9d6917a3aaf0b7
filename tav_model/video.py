"""Read and write videos with PyAV.

For trusted files only: FFmpeg, which decodes in this process, may crash or hang on a file that is broken on purpose.
The pipeline decodes the videos of its users in a process of its own (`tav.media.decoding`).
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from tav_model.errors import TavError
from tav_model.files import atomic_file

if TYPE_CHECKING:
    import av
    import numpy as np

# One thread and no lookahead: libx264's lookahead thread depends on the machine's load, which would change the file.
X264 = {"crf": "17", "preset": "medium", "threads": "1", "x264-params": "rc-lookahead=0:sync-lookahead=0:mbtree=0"}
BT709 = 1  # FFmpeg's code for this standard, the same for primaries, transfer and matrix.
MPEG_RANGE = 1  # FFmpeg's code for limited ("video") levels, 16 to 235.


def read_video(
    path: str | Path, num_frames: int | None = None, height: int | None = None, width: int | None = None
) -> tuple[np.ndarray, Fraction]:
    """Return the frames of a trusted video, `f h w 3` in uint8, RGB, and the rate at which they keep its speed.

    Args:
        path: the video.
        num_frames: frames to use, evenly spaced from the first to the last; by default all.
        height: of the frames in pixels, which are cropped at their centre and resized; by default the video's.
        width: as `height`.

    Raises:
        TavError: missing, damaged, or with fewer frames than asked for.
    """
    import av
    import numpy as np

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            if stream.average_rate is None:
                raise ValueError("no frame rate")
            fps, indexes = Fraction(stream.average_rate), None
            if num_frames is not None:
                available = sum(1 for _ in container.decode(stream))
                if not 1 <= num_frames <= available:
                    raise TavError(f"{path}: num_frames: {num_frames} must be between 1 and {available}, which it has")
                indexes = evenly_spaced(available, num_frames)
                fps = playback_rate(fps, indexes)
                container.seek(0)
            frames = [
                _prepared(frame, width, height)
                for index, frame in enumerate(container.decode(stream))
                if indexes is None or index in indexes
            ]
            return np.stack(frames), fps
    except FileNotFoundError:
        raise TavError(f"{path}: no such file") from None
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        raise TavError(f"{path}: not a video that can be read ({error})") from None


def write_video(path: str | Path, frames: np.ndarray, fps: Fraction | float) -> None:
    """Write frames as an H.264 video in yuv420p, which all players support; equal frames result in equal files.

    yuv420p has one colour sample for two pixels, so the last row or column of an odd side is repeated.

    Args:
        path: the MP4 file to write.
        frames: `f h w 3`, RGB, in uint8, or floating-point in [0, 1] as `TuneAVideoPipeline` returns them.
        fps: frames per second.
    """
    import av
    import numpy as np

    if np.issubdtype(frames.dtype, np.floating):
        frames = (frames * 255).round().astype(np.uint8)
    rate = fps if isinstance(fps, Fraction) else Fraction(fps).limit_denominator(1001)
    _, height, width, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with (
        atomic_file(Path(path)) as temporary,
        av.open(str(temporary), "w", options={"movflags": "+faststart"}) as container,
    ):
        stream = container.add_stream("libx264", rate=rate, options=X264)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = MPEG_RANGE
        for pixels in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(picture.reformat(format="yuv420p", dst_colorspace="ITU709")))
        container.mux(stream.encode(None))


def evenly_spaced(available: int, count: int) -> list[int]:
    """Return the indexes of `count` of the available frames, from the first to the last."""
    if count == 1:
        return [0]
    return [round(i * (available - 1) / (count - 1)) for i in range(count)]


def playback_rate(source: Fraction, indexes: list[int]) -> Fraction:
    """Return the frame rate, in frames per second, at which the selected frames keep the source's speed; at least 1."""
    if len(indexes) < 2:
        return source
    return max(Fraction(1), source * (len(indexes) - 1) / (indexes[-1] - indexes[0]))


def _prepared(frame: av.VideoFrame, width: int | None, height: int | None) -> np.ndarray:
    """Return a decoded frame upright and at the size that was asked for."""
    import numpy as np
    from PIL import Image, ImageOps

    pixels = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
    size = (width or pixels.shape[1], height or pixels.shape[0])
    if (pixels.shape[1], pixels.shape[0]) == size:
        return pixels
    return np.asarray(ImageOps.fit(Image.fromarray(pixels), size, Image.Resampling.LANCZOS))
