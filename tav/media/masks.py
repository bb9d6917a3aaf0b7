"""Masks of the user: where a video is edited, from an image, a folder of images, a video, or keyed boxes."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tav.config import DecodeParams
from tav.config.paths import project_path
from tav.config.presets import NOT_FILES
from tav.media.decoding import Frames, read_frames, read_measured_frames
from tav.media.frame_readers import IMAGE_SUFFIXES
from tav_model.errors import TavError
from tav_model.files import read_json

if TYPE_CHECKING:
    import numpy as np

FORMS = "an image, a folder of images, a video or a JSON file of boxes"
BOXES = '{"FRAME": [LEFT, TOP, RIGHT, BOTTOM], ...}'


def check_mask(root: Path, mask: str | None, where: str) -> None:
    """Check a mask that a prompt or a parameter names, before any work starts.

    Args:
        root: the project's folder.
        mask: a path in the project, one of `NOT_FILES`, or None.
        where: what names the mask, for messages.

    Raises:
        TavError: it is missing or no mask, or the path leads out of the project.
    """
    if mask is not None and mask not in NOT_FILES:
        check_mask_file(project_path(root, mask, where), f"{where}: {mask}")


def check_mask_file(path: Path, name: str) -> None:
    """Check that a file or folder is a mask, by its first frame.

    Args:
        path: as for `load_mask`.
        name: what it is called in messages.

    Raises:
        TavError: it is missing or no mask.
    """
    try:
        load_mask(path, DecodeParams(frames=1, width=64, height=64))
    except TavError as error:
        reason = str(error).removeprefix(f"{path}: ").replace(str(path), path.name)
        # What has another suffix is read as a video, whatever the user took it for.
        is_other = path.is_file() and path.suffix.lower() not in (*IMAGE_SUFFIXES, ".json")
        raise TavError(f"{name}: {reason}{f'; a mask must be {FORMS}' if is_other else ''}") from None


def load_mask(path: Path, decode: DecodeParams) -> np.ndarray:
    """Return a mask, `f H W` bool, for the frames that the section `decode` selects: white is edited.

    Args:
        path: an image, for all frames; a folder of numbered images or a video, with as many frames as the clip or as the
            section selects; or a JSON file of keyed boxes. All but boxes are fitted to the size as the clip is.
        decode: the clip's section, with the number of its frames.

    Raises:
        TavError: missing, unreadable, too short, or not in the form of keyed boxes.
    """
    import numpy as np

    if path.suffix.lower() == ".json":
        return _boxes(path, decode)
    if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES:
        one = decode.model_copy(update={"frames": 1, "sampling": "uniform", "start": 0, "end": None})
        still = read_image(path, one).frames.mean(axis=-1) > 127.5
        return np.broadcast_to(still, (_number(decode), *still.shape[1:]))
    else:
        frames = _read_moving(path, decode)
    return frames.mean(axis=-1) > 127.5


def read_image(path: Path, decode: DecodeParams) -> Frames:
    """Read a single image as a clip of one frame, whatever its name.

    Raises:
        TavError: it cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="tav-") as folder:
        copy = Path(folder) / f"0{path.suffix.lower()}"
        shutil.copyfile(path, copy)
        try:
            return read_measured_frames(Path(folder), decode)
        except TavError as error:
            reason = str(error).removeprefix(f"{folder}: ").removeprefix(copy.name).lstrip(": ")
            raise TavError(f"{path}: {reason.replace(str(copy), str(path))}") from None


def _number(decode: DecodeParams) -> int:
    assert decode.frames != "all"  # noqa: S101 (the caller knows how many frames the clip has)
    return decode.frames


def _read_moving(path: Path, decode: DecodeParams) -> np.ndarray:
    try:
        return read_frames(path, decode)[0]
    except TavError as error:
        # A mask of the selected frames alone has none to select.
        selected = decode.model_copy(update={"sampling": "uniform", "start": 0, "end": None})
        if selected == decode:
            raise
        try:
            return read_frames(path, selected)[0]
        except TavError:
            raise error from None


def _boxes(path: Path, decode: DecodeParams) -> np.ndarray:
    """Return the mask of boxes in pixels, keyed by number of the frame, from 0; between keys, they are interpolated."""
    import numpy as np

    record: Any = read_json(path)
    try:
        keyed = {int(frame): [float(value) for value in box] for frame, box in record.items()}
        frames = sorted(keyed)
        if not keyed or any(len(box) != 4 for box in keyed.values()) or frames[0] < 0:
            raise ValueError
        corners = np.array([keyed[frame] for frame in frames])
        if not np.isfinite(corners).all():
            raise ValueError
    except (ValueError, TypeError, AttributeError):
        raise TavError(f"{path}: not keyed boxes; must be {BOXES}, in pixels") from None
    mask = np.zeros((_number(decode), decode.height, decode.width), bool)
    for number, one in enumerate(mask):
        left, top, right, bottom = (round(float(np.interp(number, frames, side))) for side in corners.T)
        one[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = True
    return mask
