"""Check the masks that prompts and parameters name, before any work starts."""

from __future__ import annotations

from pathlib import Path

from tav.config.paths import project_path
from tav.config.presets import NOT_FILES
from tav_model.errors import TavError


def check_mask(root: Path, mask: str | None, where: str) -> None:
    """Check that the file or folder of a mask is there.

    Args:
        root: the project's folder.
        mask: a path in the project, one of `NOT_FILES`, or None.
        where: what names the mask, for messages.

    Raises:
        TavError: it is not, or the path leads out of the project.
    """
    if mask is not None and mask not in NOT_FILES and not project_path(root, mask, where).exists():
        raise TavError(f"{where}: {mask}: no such file")
