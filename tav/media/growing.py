"""A video that can be watched while it grows: each part is encoded once, and appended without encoding the others again."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from tav_model.video import join_videos, video_writer

if TYPE_CHECKING:
    import numpy as np


class GrowingVideo:
    """The parts of a video in a folder, and `preview.mp4`, which always plays: all of them so far.

    Args:
        folder: where the parts are, also those of an earlier run.
        fps: frames per second.

    Attributes:
        path: of the video.
    """

    def __init__(self, folder: Path, fps: Fraction) -> None:
        self.folder, self.fps, self.path = folder, fps, folder / "preview.mp4"

    def __contains__(self, start: int) -> bool:
        return self._part(start).exists()

    def add(self, start: int, frames: Iterable[np.ndarray]) -> None:
        """Append a part that begins at frame `start`: its frames `f h w 3` in uint8, some at a time."""
        with video_writer(self._part(start), self.fps) as video:
            for some in frames:
                video.write(some)
        join_videos(sorted(self.folder.glob("part-*.mp4")), self.path, self.fps)

    def _part(self, start: int) -> Path:
        return self.folder / f"part-{start:06d}.mp4"
