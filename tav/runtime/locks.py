"""Locks that go with the process that holds them, however that ends; the file says who that is."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path
from typing import TextIO

LOOK_SECONDS = 0.5


def take(file: TextIO, holder: str) -> bool:
    """Lock an open file, and write into it who has it; False: another one has.

    Those who only look (`holder`) hold it for an instant, which is waited for.
    """
    end = time.monotonic() + LOOK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.02)
    file.truncate(0)
    file.write(holder)
    file.flush()
    return True


def holder(path: Path) -> str | None:
    """What the process wrote that holds the lock of this file now; None where nobody does."""
    try:
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read()
    except FileNotFoundError:
        pass
    return None
