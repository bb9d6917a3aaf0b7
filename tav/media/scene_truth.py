"""Load the ground truth of a clip's edits, which is known for clips that toyworld has rendered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tav.config.paths import Project

if TYPE_CHECKING:
    from pathlib import Path

    from tav.config import Params
    from toyworld.scenes import Truth


def load_clip_truth(root: Path, clip: str, params: Params) -> tuple[Truth | None, list[int]]:
    """Return the ground truth of a clip and the indexes of the frames that its edits show.

    Both are empty (None and no indexes) for a clip without a scene file.

    Raises:
        TavError: the scene file is invalid, or has fewer frames than the parameters select.
    """
    from tav.media.frame_selection import select_frames
    from toyworld.scenes import load_truth

    path = Project(root).scene(clip)
    if not path.exists():
        return None, []
    truth = load_truth(path)
    return truth, select_frames(params.for_clip(clip).decode, truth.frames)
