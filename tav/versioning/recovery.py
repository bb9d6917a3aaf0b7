"""What a killed DVC may leave: a half-written dvc.lock and locks of the dead, which it refuses; half copies in its cache.

DVC writes the first two in place. What is dropped of dvc.lock costs nothing: the stages are restored from the run cache.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tav_model.files import write_text

if TYPE_CHECKING:
    from dvc.repo import Repo

logger = logging.getLogger(__name__)

HALF_COPIES = "[0-9a-f][0-9a-f]/.*.tmp"
ABANDONED_SECONDS = 600  # Who copies a file writes all the time. Other projects may share the cache.
HEAD = "schema: '2.0'\nstages:\n"  # of every dvc.lock that DVC writes
ENTRY = re.compile(r"^  \S", re.MULTILINE)  # where the entry of a stage begins


def mend(repo: Repo) -> None:
    """Mend both, where that is needed. To be called with DVC's lock on the project held.

    Raises:
        dvc.lock.LockError: another process is just changing DVC's locks.
    """
    _mend_lock_file(repo)
    _clear_dead_locks(repo)


def remove_partial_copies(repo: Repo) -> None:
    """Remove from DVC's cache what killed processes had copied into it by half, and nobody has written to for long."""
    for path in Path(repo.cache.local.path).glob(HALF_COPIES):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < time.time() - ABANDONED_SECONDS:
                path.unlink()
                logger.info("removed from DVC's cache what a killed process has left: %s", path.name)


def _mend_lock_file(repo: Repo) -> None:
    """Cut dvc.lock to the entries that are whole: it is written from the start to the end."""
    path = Path(repo.root_dir) / "dvc.lock"
    try:
        text = path.read_bytes().decode("utf-8", errors="ignore")
    except FileNotFoundError:
        return
    if not text.startswith(HEAD) and not HEAD.startswith(text):
        return  # Somebody else's doing, not to be thrown away.
    start = max((match.start() for match in ENTRY.finditer(text)), default=0)
    if start and _is_whole(text[start:]):
        return
    whole = text[:start]
    if ENTRY.search(whole):
        write_text(path, whole)
    else:
        path.unlink()
    logger.warning("dvc.lock was half-written when DVC was killed: %d stages of it are kept", len(ENTRY.findall(whole)))


def _is_whole(entry: str) -> bool:
    """Whether the last entry ends at the end of a line, and not within the list or the output that it ends with.

    One that lacks whole outputs is not up to date, and is restored as such.
    """
    last = entry.rpartition("    - path:")[2]
    is_cut_in_output = "\n    outs:\n" in entry and (
        "size:" not in last or (".dir\n" in last and "nfiles:" not in last)
    )
    return entry.endswith("\n") and not entry.endswith(":\n") and not is_cut_in_output


def _clear_dead_locks(repo: Repo) -> None:
    """Drop from DVC's table of locks those of processes that have ended, also where others have their numbers now."""
    from dvc.lock import make_lock

    path = Path(repo.tmp_dir) / "rwlock"
    if not path.exists() or not _dead(path):
        return
    hardlink = repo.config["core"].get("hardlink_lock", False)
    with make_lock(f"{path}.lock", tmp_dir=repo.tmp_dir, hardlink_lock=hardlink):
        dead = _dead(path)  # Again, now that nobody writes it.
        if not dead:
            return
        table = _table(path) or {}
        write = {name: holder for name, holder in table.get("write", {}).items() if holder["pid"] not in dead}
        read = {
            name: [holder for holder in holders if holder["pid"] not in dead]
            for name, holders in table.get("read", {}).items()
        }
        write_text(path, json.dumps({"write": write, "read": {name: kept for name, kept in read.items() if kept}}))
    logger.info("cleared DVC's locks of processes that have ended: %s", ", ".join(map(str, sorted(dead))))


def _table(path: Path) -> dict[str, Any] | None:
    """None: it is not whole."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        for holder in _holders(table):
            int(holder["pid"])
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return table


def _holders(table: dict[str, Any]) -> list[dict[str, Any]]:
    return [*table.get("write", {}).values(), *(one for holders in table.get("read", {}).values() for one in holders)]


def _dead(path: Path) -> set[int]:
    """The numbers of processes in the table that have ended; -1 for one that was killed while it wrote the table."""
    import psutil

    table, written = _table(path), path.stat().st_mtime
    if table is None:
        return {-1}

    def is_dead(pid: int) -> bool:
        try:
            # A process that is younger than the table has not written into it. Clocks of both differ by less than this.
            return psutil.Process(pid).create_time() > written + 1
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False

    return {pid for pid in {holder["pid"] for holder in _holders(table)} if is_dead(pid)}
