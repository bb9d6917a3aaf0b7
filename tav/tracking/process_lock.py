"""A lock that one process holds at a time, and others wait for."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def process_lock(path: Path) -> Iterator[None]:
    """Hold the lock of a file, which is created; wait for a process that holds it. It ends with the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
