"""Write previews of videos."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from tav_model.files import atomic_file

if TYPE_CHECKING:
    import numpy as np

PREVIEW_SIDE = 320  # Pixels of the longer side, at most.


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
