"""File locks that are released when the process ends, however it ends; the file says which process holds it.

The locks of GPUs are in `tav.runtime.devices`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RETRY_SECONDS = 0.5


class Locked(Exception):  # noqa: N818 (a state of affairs, not a failure)
    """Another process holds the lock; `holder` is what it wrote about itself, {} where it has not yet."""

    def __init__(self, holder: dict[str, Any]) -> None:
        super().__init__()
        self.holder = holder


@contextlib.contextmanager
def file_lock(path: Path, **holder: Any) -> Iterator[None]:
    """Hold the lock of a file, and write into the file, as JSON, which process that is.

    Args:
        path: the lock file; its folder is made where it is missing.
        holder: what others may read about the holder, beside `process`, the process's id.

    Raises:
        Locked: another process holds it.
        OSError: the file cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        end = time.monotonic() + RETRY_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # A process that only reads who the holder is (`lock_holder`) holds the lock briefly.
                if time.monotonic() >= end:
                    raise Locked(lock_holder(path) or {}) from None
                time.sleep(0.02)
        file.truncate(0)
        file.write(json.dumps({"process": os.getpid(), **holder}))
        file.flush()
        yield


@contextlib.contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Wait for the lock of a file, and hold it; the file is created if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def lock_holder(path: Path) -> dict[str, Any] | None:
    """Return what the process that holds the lock now wrote about itself; None where none does."""
    try:
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _parse(file.read())
    except FileNotFoundError:
        pass
    return None


def _parse(text: str) -> dict[str, Any]:
    try:
        holder: Mapping[str, Any] = json.loads(text)
        return dict(holder)
    except (ValueError, TypeError):
        return {}  # Read in the instant before it was written.
