"""Repair what a killed DVC process may leave: a truncated dvc.lock, stale locks, and partial copies in its cache.

DVC refuses to work with the first two, because it writes them in place. Entries dropped from dvc.lock cost no work: their
stages are restored from the run cache.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

from tav_model.files import write_text

logger = logging.getLogger(__name__)

PARTIAL_COPIES = "[0-9a-f][0-9a-f]/.*.tmp"
ABANDONED_SECONDS = 600  # A process that copies a file writes all the time. Other projects may share the cache.
HEADER = "schema: '2.0'\nstages:\n"  # of every dvc.lock that DVC writes
ENTRY = re.compile(r"^  \S", re.MULTILINE)  # where the entry of a stage begins
DAMAGED = -1  # in place of a process id: the table of locks is damaged


class _Holder(TypedDict):
    """A process in DVC's table of locks; `cmd` is its command."""

    pid: int
    cmd: str


class _LockTable(TypedDict):
    """DVC's table of locks, `.dvc/tmp/rwlock`: which processes write and read each path."""

    write: dict[str, _Holder]
    read: dict[str, list[_Holder]]


def remove_partial_copies(cache: Path) -> None:
    """Remove files from DVC's cache that were only partly copied and have not been written to for long."""
    for path in cache.glob(PARTIAL_COPIES):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < time.time() - ABANDONED_SECONDS:
                path.unlink()
                logger.info("removed a partial copy of a killed process from DVC's cache: %s", path.name)


def repair_lock_file(path: Path) -> None:
    """Truncate dvc.lock after its last complete entry, because DVC writes it from start to end.

    A file that does not begin as DVC's do was written by someone else, and is left alone.
    """
    try:
        text = path.read_bytes().decode("utf-8", errors="ignore")
    except FileNotFoundError:
        return
    if not text.startswith(HEADER) and not HEADER.startswith(text):
        return
    start = max((match.start() for match in ENTRY.finditer(text)), default=0)
    if start and _is_complete(text[start:]):
        return
    complete = text[:start]
    if ENTRY.search(complete):
        write_text(path, complete)
    else:
        path.unlink()
    logger.warning(
        "dvc.lock was truncated when DVC was killed: %d of its stages are kept", len(ENTRY.findall(complete))
    )


def _is_complete(entry: str) -> bool:
    """Return whether the last entry ends at the end of a line, and not within the list or the output that it ends with.

    An entry that lacks complete outputs passes: its stage is not up to date, and is restored.
    """
    last = entry.rpartition("    - path:")[2]
    is_cut_in_output = "\n    outs:\n" in entry and (
        "size:" not in last or (".dir\n" in last and "nfiles:" not in last)
    )
    return entry.endswith("\n") and not entry.endswith(":\n") and not is_cut_in_output


def has_stale_locks(path: Path) -> bool:
    """Return whether DVC's table of locks is damaged, or names processes that have ended.

    Args:
        path: the table, `.dvc/tmp/rwlock`.
    """
    return path.exists() and bool(_ended_processes(path))


def clear_stale_locks(path: Path) -> None:
    """Drop the locks of processes that have ended, even if other processes have their ids now.

    Args:
        path: the table of locks. The caller holds the lock under which DVC changes it.
    """
    ended = _ended_processes(path)
    if not ended:
        return
    table = _read_table(path) or {"write": {}, "read": {}}
    write = {name: holder for name, holder in table["write"].items() if holder["pid"] not in ended}
    read = {
        name: [holder for holder in holders if holder["pid"] not in ended] for name, holders in table["read"].items()
    }
    write_text(path, json.dumps({"write": write, "read": {name: kept for name, kept in read.items() if kept}}))
    logger.info("cleared DVC's locks of processes that have ended: %s", ", ".join(map(str, sorted(ended))))


def _read_table(path: Path) -> _LockTable | None:
    """Return the table of locks; None if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        table: _LockTable = {"write": content.get("write", {}), "read": content.get("read", {})}
        for holder in _holders(table):
            int(holder["pid"])
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return table


def _holders(table: _LockTable) -> Iterator[_Holder]:
    yield from table["write"].values()
    for holders in table["read"].values():
        yield from holders


def _ended_processes(path: Path) -> set[int]:
    """Return the ids of processes in the table that have ended; `DAMAGED` if one was killed while it wrote the table."""
    import psutil

    table, written = _read_table(path), path.stat().st_mtime
    if table is None:
        return {DAMAGED}

    def has_ended(pid: int) -> bool:
        try:
            # A process that is younger than the table has not written into it. The clocks differ by less than a second.
            return psutil.Process(pid).create_time() > written + 1
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False

    return {pid for pid in {holder["pid"] for holder in _holders(table)} if has_ended(pid)}
