"""What a killed DVC process leaves is repaired; what belongs to others is left alone.

tests/faults/test_leftovers.py does the same with real projects.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tav.versioning.recovery import (
    ABANDONED_SECONDS,
    clear_stale_locks,
    has_stale_locks,
    remove_partial_copies,
    repair_lock_file,
)

FIRST = "  decode@ball:\n    cmd: a\n    outs:\n    - path: frames\n      md5: 1.dir\n      size: 2\n      nfiles: 1\n"
SECOND = "  encode@ball:\n    cmd: b\n    outs:\n    - path: latents.csv\n      md5: 3\n      size: 4\n"
HEADER = "schema: '2.0'\nstages:\n"


@pytest.fixture
def ended() -> int:
    """Return the id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HEADER + FIRST + SECOND, HEADER + FIRST + SECOND),
        (HEADER + FIRST + SECOND[:-9], HEADER + FIRST),
        (HEADER + FIRST + "  enc", HEADER + FIRST),
        (HEADER + FIRST + "  encode@ball:\n", HEADER + FIRST),
        (HEADER + FIRST[:-16], None),  # in the middle of an output
        (HEADER[:9], None),
        ("", None),
        ("stages: [", "stages: ["),  # not DVC's
    ],
)
def test_a_lock_file_is_cut_after_its_last_complete_entry(tmp_path: Path, text: str, expected: str | None) -> None:
    path = tmp_path / "dvc.lock"
    path.write_text(text)
    repair_lock_file(path)
    assert (path.read_text() if path.exists() else None) == expected


def test_no_lock_file(tmp_path: Path) -> None:
    repair_lock_file(tmp_path / "dvc.lock")
    assert list(tmp_path.iterdir()) == []


def test_locks_of_ended_processes_are_dropped_and_others_are_kept(tmp_path: Path, ended: int) -> None:
    table = tmp_path / "rwlock"
    assert not has_stale_locks(table)
    mine, theirs = {"pid": os.getpid(), "cmd": "me"}, {"pid": ended, "cmd": "dvc repro"}
    table.write_text(json.dumps({"write": {"a": mine, "b": theirs}, "read": {"c": [mine, theirs], "d": [theirs]}}))
    assert has_stale_locks(table)
    clear_stale_locks(table)
    assert json.loads(table.read_text()) == {"write": {"a": mine}, "read": {"c": [mine]}}
    assert not has_stale_locks(table)


def test_a_process_that_is_younger_than_the_table_is_another_one(tmp_path: Path) -> None:
    table = tmp_path / "rwlock"
    table.write_text(json.dumps({"write": {"a": {"pid": os.getpid(), "cmd": "me"}}}))
    os.utime(table, (0, 0))
    assert has_stale_locks(table)


@pytest.mark.parametrize("text", ["", "[]", '{"write": {', '{"write": {"a": {}}}'])
def test_a_damaged_table_is_emptied(tmp_path: Path, text: str) -> None:
    table = tmp_path / "rwlock"
    table.write_text(text)
    assert has_stale_locks(table)
    clear_stale_locks(table)
    assert json.loads(table.read_text()) == {"write": {}, "read": {}}


def test_only_abandoned_partial_copies_are_removed(tmp_path: Path) -> None:
    (tmp_path / "ab").mkdir()
    abandoned, recent, complete = (tmp_path / "ab" / name for name in (".x.tmp", ".y.tmp", "cdef"))
    for path in (abandoned, recent, complete):
        path.touch()
    before = time.time() - ABANDONED_SECONDS - 1
    for path in (abandoned, complete):
        os.utime(path, (before, before))
    remove_partial_copies(tmp_path)
    assert sorted(path.name for path in (tmp_path / "ab").iterdir()) == [".y.tmp", "cdef"]
