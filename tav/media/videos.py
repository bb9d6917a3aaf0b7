"""Write previews of videos."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from tav_model.files import atomic_file
from tav_model.video import evenly_spaced

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

PREVIEW_SIDE = 320  # Pixels of the longer side, at most.
PREVIEW_FRAMES = 128  # Of longer videos, so many are shown.


class Preview:
    """A small animated WebP of a video, which repeats without end; long videos are sampled evenly.

    Args:
        num_frames: of the video.
        fps: its frames per second.
    """

    def __init__(self, num_frames: int, fps: Fraction) -> None:
        self.num_frames, self.fps = num_frames, fps
        self._wanted = set(evenly_spaced(num_frames, min(num_frames, PREVIEW_FRAMES)))
        self._received = 0
        self._images: list[Image.Image] = []

    def add(self, frames: np.ndarray) -> None:
        """Receive the next frames of the video, `f h w 3` in uint8."""
        from PIL import Image

        for index, pixels in enumerate(frames, self._received):
            if index in self._wanted:
                image = Image.fromarray(pixels)
                image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE), Image.Resampling.LANCZOS)
                self._images.append(image)
        self._received += len(frames)

    def write(self, path: Path) -> None:
        """Write the preview of the frames received."""
        first, *others = self._images
        milliseconds = max(1, round(1000 * self.num_frames / len(self._wanted) / self.fps))
        with atomic_file(path) as temporary:
            first.save(
                temporary, format="WEBP", save_all=True, append_images=others, duration=milliseconds, loop=0, quality=80
            )
