"""The ground truth of a clip's edits, where the clip was rendered by toyworld and has a scene file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tav.config.paths import Project

if TYPE_CHECKING:
    from pathlib import Path

    from tav.config import Params
    from toyworld.scenes import Truth


def load_clip_truth(root: Path, clip: str, params: Params) -> tuple[Truth | None, list[int]]:
    """What the edits of a clip should come to, where it has a scene file, and which frames of the clip they have.

    Raises:
        TavError: not a scene file, or fewer frames than the parameters ask for.
    """
    from tav.media.frame_selection import select_frames
    from toyworld.scenes import load_truth

    path = Project(root).scene(clip)
    if not path.exists():
        return None, []
    truth = load_truth(path)
    return truth, select_frames(params.decode_for(clip), truth.frames)
