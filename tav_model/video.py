"""Read and write videos with PyAV.

For trusted files only: FFmpeg, which decodes in this process, may crash or hang on a file that is broken on purpose.
The pipeline decodes the videos of its users in a process of its own (`tav.media.decoding`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tav_model.errors import TavError
from tav_model.files import atomic_file

if TYPE_CHECKING:
    import av
    import numpy as np
    from av.container import InputContainer, OutputContainer

# One thread and no lookahead: libx264's lookahead thread depends on the machine's load, which would change the file.
X264 = {"crf": "17", "preset": "medium", "threads": "1", "x264-params": "rc-lookahead=0:sync-lookahead=0:mbtree=0"}
DELAY = 2  # frames that X264 decodes before the first one is shown, at most
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
    import numpy as np

    def choose(available: int) -> list[int]:
        if num_frames is None:
            return list(range(available))
        if not 1 <= num_frames <= available:
            raise TavError(f"{path}: num_frames: {num_frames} must be between 1 and {available}, which it has")
        return evenly_spaced(available, num_frames)

    if num_frames is None:
        with _opened(path) as (container, stream, fps):
            return np.stack([_prepared(frame, width, height) for frame in container.decode(stream)]), fps
    frames, _, fps, indexes = _selected(path, choose, width, height)
    return frames, playback_rate(fps, indexes)


def sample_video(path: str | Path, choose: Callable[[int], Sequence[int]]) -> tuple[np.ndarray, int, Fraction]:
    """Return some frames of a trusted video, the number of all of them, and the frame rate.

    Only the chosen frames are in memory, and nothing after the last of them is read.

    Args:
        path: the video.
        choose: receives the number of frames, and returns the ascending indexes of those to return.

    Raises:
        TavError: missing or damaged.
    """
    frames, available, fps, _ = _selected(path, choose)
    return frames, available, fps


def iterate_video(path: str | Path, size: int) -> Iterator[np.ndarray]:
    """Yield the frames of a trusted video, `size` at a time: `f h w 3` in uint8.

    Raises:
        TavError: missing or damaged.
    """
    import numpy as np

    with _opened(path) as (container, stream, _):
        part: list[np.ndarray] = []
        for frame in container.decode(stream):
            part.append(_prepared(frame, None, None))
            if len(part) == size:
                yield np.stack(part)
                part = []
        if part:
            yield np.stack(part)


def _selected(
    path: str | Path, choose: Callable[[int], Sequence[int]], width: int | None = None, height: int | None = None
) -> tuple[np.ndarray, int, Fraction, list[int]]:
    import numpy as np

    with _opened(path) as (container, stream, fps):
        available = stream.frames
        if not available:  # The container does not say.
            available = sum(1 for _ in container.decode(stream))
            container.seek(0)
        indexes = list(choose(available))
        frames: list[np.ndarray] = []
        for index, frame in enumerate(container.decode(stream)):
            if len(frames) < len(indexes) and index == indexes[len(frames)]:
                frames.append(_prepared(frame, width, height))
            if len(frames) == len(indexes):
                break
        if len(frames) < len(indexes):
            raise TavError(f"{path}: not a complete video; {available} frames are declared")
        return np.stack(frames), available, fps, indexes


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[tuple[InputContainer, av.VideoStream, Fraction]]:
    """Open a video, with errors in one line."""
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            if stream.average_rate is None:
                raise ValueError("no frame rate")
            yield container, stream, Fraction(stream.average_rate)
    except FileNotFoundError:
        raise TavError(f"{path}: no such file") from None
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        raise TavError(f"{path}: not a video that can be read ({error})") from None


def write_video(path: str | Path, frames: np.ndarray, fps: Fraction | float, audio: str | Path | None = None) -> None:
    """Write frames as a video: see `video_writer`.

    Args:
        path: the MP4 file to write.
        frames: `f h w 3`, RGB, in uint8, or floating-point in [0, 1] as `TuneAVideoPipeline` returns them.
        fps: frames per second.
        audio: a file with AAC audio to copy into the video.
    """
    with video_writer(path, fps, audio) as video:
        video.write(frames)


@contextlib.contextmanager
def video_writer(path: str | Path, fps: Fraction | float, audio: str | Path | None = None) -> Iterator[VideoWriter]:
    """Write an H.264 video part by part, in yuv420p, which all players support; equal frames result in equal files.

    yuv420p has one colour sample for two pixels, so the last row or column of an odd side is repeated. The file appears, in
    one piece, when the context ends without an error.

    Args:
        path: the MP4 file to write.
        fps: frames per second.
        audio: a file with AAC audio to copy into the video, up to the end of the frames.
    """
    import av

    with contextlib.ExitStack() as files:
        temporary = files.enter_context(atomic_file(Path(path)))
        container = files.enter_context(av.open(str(temporary), "w", options={"movflags": "+faststart"}))
        sound = None if audio is None else files.enter_context(av.open(str(audio)))
        writer = VideoWriter(container, fps, sound)
        yield writer
        writer.finish()


class VideoWriter:
    """The frames of a video that is being written; see `video_writer`."""

    def __init__(self, container: OutputContainer, fps: Fraction | float, sound: InputContainer | None = None) -> None:
        self._container, self._sound = container, sound
        self._rate = fps if isinstance(fps, Fraction) else Fraction(fps).limit_denominator(1001)
        self._stream: av.VideoStream | None = None
        self._packets: Iterator[Any] = iter(())
        self._packet: Any = None
        self._count = 0

    def write(self, frames: np.ndarray) -> None:
        """Append frames, `f h w 3`, RGB, in uint8, or floating-point in [0, 1]; all parts have the same size."""
        import av
        import numpy as np

        if np.issubdtype(frames.dtype, np.floating):
            frames = (frames * 255).round().astype(np.uint8)
        _, height, width, _ = frames.shape
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._stream is None:
            self._stream = self._start(*frames.shape[1:3])
        for pixels in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            self._container.mux(self._stream.encode(picture.reformat(format="yuv420p", dst_colorspace="ITU709")))
            self._count += 1
            self._copy_sound()

    def finish(self) -> None:
        """Write the frames that the encoder still holds."""
        if self._stream is not None:
            self._container.mux(self._stream.encode(None))

    def _start(self, height: int, width: int) -> av.VideoStream:
        stream = self._container.add_stream("libx264", rate=self._rate, options=X264)
        stream.height, stream.width = height, width
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = MPEG_RANGE
        if self._sound is not None and self._sound.streams.audio:
            source = self._sound.streams.audio[0]
            self._audio_stream = self._container.add_stream_from_template(source)
            self._packets = self._sound.demux(source)
            self._packet = next(self._packets, None)
        return stream

    def _copy_sound(self) -> None:
        """Copy the audio that plays until the end of the frames so far, so that the streams are interleaved."""
        end = self._count / self._rate
        while self._packet is not None:
            if self._packet.dts is not None:  # The last one is empty.
                if self._packet.dts * self._packet.time_base >= end:
                    break
                self._packet.stream = self._audio_stream
                self._container.mux(self._packet)
            self._packet = next(self._packets, None)


def join_videos(paths: Sequence[str | Path], target: str | Path, fps: Fraction) -> None:
    """Join videos of `video_writer`, of the same size, one after the other, without encoding them again.

    Args:
        paths: the videos.
        target: the MP4 file to write.
        fps: frames per second of all of them.
    """
    import av

    with atomic_file(Path(target)) as temporary, av.open(str(temporary), "w") as joined:
        stream, frames = None, 0
        for path in paths:
            with av.open(str(path)) as part:
                source = part.streams.video[0]
                stream = stream or joined.add_stream_from_template(source)
                ticks = 1 / Fraction(source.time_base or 1)  # of a second
                offset = round(frames / fps * ticks)
                for packet in part.demux(source):
                    if packet.pts is None:  # The last one is empty.
                        continue
                    # Evenly spaced, although short parts need less delay: gaps would change the rate.
                    packet.dts = round((frames - DELAY) / fps * ticks)
                    packet.pts, packet.stream = packet.pts + offset, stream
                    joined.mux(packet)
                    frames += 1


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
