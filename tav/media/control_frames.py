"""The frames that a control signal is made from: the clip's own, another clip's, or conditions that the user has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tav.media.decoding import Frames, read_frames, read_measured_frames
from tav.media.frame_readers import IMAGE_SUFFIXES
from tav.media.frame_selection import select_frames
from tav.media.masks import read_image
from tav_model.errors import TavError

if TYPE_CHECKING:
    import numpy as np

    from tav.config import DecodeParams

# Frames of a shape that differs by more would be cropped elsewhere than the clip's.
SHAPE_TOLERANCE = 0.02


def read_given_frames(path: Path, video: Path, decode: DecodeParams) -> np.ndarray:
    """Return conditions that the user has, `f h w 3` in uint8, for the frames that the section `decode` selects.

    Args:
        path: an image, for all frames; or a video or a folder of numbered images, with as many frames as the clip, or as the
            section selects. They have the shape of the clip's frames, or that of the section.
        video: the clip.
        decode: the clip's section.

    Raises:
        TavError: missing or unreadable, or of another number or shape.
    """
    import numpy as np

    everything = decode.model_copy(update={"sampling": "uniform", "start": 0, "end": None})
    first = everything.model_copy(update={"frames": 1})
    is_image = path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES
    given = read_image(path, first) if is_image else read_measured_frames(path, first)
    clip = read_measured_frames(video, first)
    _check_shape(path, given, clip, decode)
    wanted = len(select_frames(decode, clip.available))
    if is_image:
        return np.repeat(given.frames, wanted, axis=0)
    if given.available == clip.available:
        return read_frames(path, decode)[0]
    if given.available == wanted:
        return read_frames(path, everything)[0]
    sampled = "" if wanted == clip.available else f", or {wanted}, as decode.frames"
    raise TavError(f"{path}: has {given.available} frames; must have {clip.available}, as the clip{sampled}")


def _check_shape(path: Path, given: Frames, clip: Frames, decode: DecodeParams) -> None:
    shapes = (clip.size, (decode.width, decode.height))
    ratio = given.size[0] / given.size[1]
    if all(abs(ratio * height / width - 1) > SHAPE_TOLERANCE for width, height in shapes):
        allowed = " or ".join(f"{width}x{height}" for width, height in dict.fromkeys(shapes))
        raise TavError(f"{path}: has {given.size[0]}x{given.size[1]} pixels; must have the shape of {allowed}")


def driving_section(own: DecodeParams, decode: DecodeParams) -> DecodeParams:
    """Return the section `decode` by which a clip is read that drives another: as many frames as the other's, as large.

    Args:
        own: that of the clip that drives, which says where to start and which frames to skip.
        decode: that of the clip that is driven.
    """
    return own.model_copy(update={name: getattr(decode, name) for name in ("frames", "width", "height")})
