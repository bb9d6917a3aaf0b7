"""Errors that mean that the disk is full, turned into one line that names the file and the space that is left."""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from tav_model.errors import FullDiskError

TEMPORARY = ".tmp-"
"""The prefix of temporary folders. Only their writer looks at them; git and DVC ignore them."""

FULL_DISK_ERRORS = {
    errno.ENOSPC: "no room left on the disk{room}; make room",
    errno.EDQUOT: "the disk quota is used up{room}; make room",
    errno.EFBIG: "larger than a file may be here; raise that limit (ulimit -f)",
}


@contextlib.contextmanager
def explained_full_disk(path: str | Path) -> Iterator[None]:
    """Replace any error that means that the disk is full by one that names `path` and the free space.

    Raises:
        FullDiskError: the disk is full. Other errors pass unchanged.
    """
    try:
        yield
    except Exception as error:
        number = _full_disk_errno(error)
        if number is None:
            raise
        text = (
            f"{FULL_DISK_ERRORS[number].format(room=_free_space(Path(path)))}, and the same command resumes from here"
        )
        if isinstance(error, FullDiskError):
            if not any(part.startswith(TEMPORARY) for part in Path(error.filename).parts):
                raise
            text = error.strerror or text
        raise FullDiskError(number, text, str(path)) from None


def _full_disk_errno(error: BaseException | None) -> int | None:
    """Return the number in `FULL_DISK_ERRORS` of an error or its causes, or None.

    Libraries that write files in native code only mention the number in their message.
    """
    while error is not None:
        mentioned = re.search(r"(?:os error |Errno )(\d+)", str(error))
        for number in (getattr(error, "errno", None), int(mentioned[1]) if mentioned else None):
            if number in FULL_DISK_ERRORS:
                return number
        error = error.__cause__ or error.__context__
    return None


def _free_space(path: Path) -> str:
    """Return ` (1.2 of 34.0 MB free)` for the disk of a file, which need not exist; empty if that is unknown."""
    with contextlib.suppress(OSError):
        existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        usage = shutil.disk_usage(existing)
        unit, size = ("GB", 1e9) if usage.free > 1e9 else ("MB", 1e6)
        return f" ({usage.free / size:.1f} of {usage.total / size:.1f} {unit} free)"
    return ""
