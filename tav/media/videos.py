"""Write videos and previews, and read the videos back."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from tav_model.errors import TavError
from tav_model.files import atomic_file

if TYPE_CHECKING:
    import numpy as np

# One thread and no lookahead: libx264's lookahead thread depends on the machine's load, which would change the file.
X264 = {"crf": "17", "preset": "medium", "threads": "1", "x264-params": "rc-lookahead=0:sync-lookahead=0:mbtree=0"}
BT709 = 1  # FFmpeg's code for this standard, the same for primaries, transfer and matrix.
MPEG_RANGE = 1  # FFmpeg's code for limited ("video") levels, 16 to 235.
PREVIEW_SIDE = 320  # Pixels of the longer side, at most.


def write_mp4(path: Path, frames: np.ndarray, fps: Fraction) -> None:
    """Write frames as an H.264 video in yuv420p, which all players support; equal frames result in equal files.

    yuv420p has one colour sample for two pixels, so the last row or column of an odd side is repeated.

    Args:
        path: the video to write.
        frames: `f h w 3` in uint8, RGB.
        fps: frames per second.
    """
    import av
    import numpy as np

    _, height, width, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with atomic_file(path) as temporary, av.open(str(temporary), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps, options=X264)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = MPEG_RANGE
        for pixels in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(picture.reformat(format="yuv420p", dst_colorspace="ITU709")))
        container.mux(stream.encode(None))


def read_mp4(path: Path) -> tuple[np.ndarray, Fraction]:
    """Return the frames of a video that `write_mp4` wrote, `f h w 3` in uint8, and its frame rate.

    Use `tav.media.decoding` for untrusted videos.

    Raises:
        TavError: missing or damaged.
    """
    import av
    import numpy as np

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            if stream.average_rate is None:
                raise ValueError("no frame rate")
            return np.stack(frames), Fraction(stream.average_rate)
    except FileNotFoundError:
        raise TavError(f"{path}: no such file") from None
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        raise TavError(f"{path}: not a video of this project ({error})") from None


def write_preview(path: Path, frames: np.ndarray, fps: Fraction) -> None:
    """Write frames, `f h w 3` in uint8, as a small animated WebP that repeats without end."""
    from PIL import Image

    images = [Image.fromarray(pixels) for pixels in frames]
    for image in images:
        image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE), Image.Resampling.LANCZOS)
    milliseconds = max(1, round(1000 / fps))
    with atomic_file(path) as temporary:
        images[0].save(
            temporary, format="WEBP", save_all=True, append_images=images[1:], duration=milliseconds, loop=0, quality=80
        )
