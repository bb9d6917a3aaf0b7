"""What a killed process leaves is cleared by the next one; what belongs to a living one is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tav.versioning.dvc_pipeline import DvcPipeline
from tav_model.errors import FullDiskError, TavError
from tav_model.files import atomic_file, atomic_folder, write_text
from tests.support.dvc_project import STAGES, environment, make_project, run_stage, take_runs

CLIP = "ball"
HALF = """
import sys, time
from pathlib import Path
from tav_model.files import atomic_{kind}
with atomic_{kind}(sys.argv[1]) as temporary:
    (temporary if temporary.is_file() else temporary / "part").write_text("half")
    print("half", flush=True)
    time.sleep(60)
"""


def temporaries(folder: Path) -> list[Path]:
    return list(folder.glob(".tmp-*"))


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_writer_leaves_goes_with_the_next_write(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"results/a {kind}.mp4"
    writer = subprocess.Popen([sys.executable, "-c", HALF.format(kind=kind), path], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "half\n"
    write_text(tmp_path / "results/another.txt", "whole")
    assert len(temporaries(path.parent)) == 1  # its writer lives
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    assert len(temporaries(path.parent)) == 1 and not path.exists()
    write_text(tmp_path / "results/another.txt", "whole")
    assert temporaries(path.parent) == []


def test_writers_beside_each_other_leave_each_other_alone(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "outer") as outer, atomic_file(tmp_path / "file.txt") as file:
        (outer / "in.txt").write_text("whole")
        file.write_text("whole")
        write_text(tmp_path / "third.txt", "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.txt", "outer", "third.txt"]
    assert (tmp_path / "outer/in.txt").read_text() == "whole"


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "somewhere/.tmp-1/else"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(122, "Disk quota exceeded"),
    ],
)
def test_a_full_disk_is_said_of_what_was_to_be_written(error: Exception, tmp_path: Path) -> None:
    path = tmp_path / "results/edit.mp4"
    with (
        pytest.raises(FullDiskError, match=r"results/edit\.mp4: .*of .* [MG]B free\); make room") as raised,
        atomic_file(path),
    ):
        raise error
    assert raised.value.filename == str(path) and raised.value.errno in (28, 122)
    assert list(path.parent.iterdir()) == []
    with pytest.raises(ZeroDivisionError), atomic_file(path):
        raise ZeroDivisionError


# DVC


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    root = make_project(tmp_path / "project")
    monkeypatch.chdir(root)
    bring_up_to_date(root)
    return root


def bring_up_to_date(root: Path) -> list[str]:
    """What a flow does; returns the stages that it had to run."""
    versions = DvcPipeline(root, wait=0)
    for stage in STAGES:
        if not versions.is_current(stage, CLIP) and not versions.restore(stage, CLIP):
            before = versions.snapshot(stage, CLIP)
            run_stage(root, stage, CLIP)
            versions.commit(stage, CLIP, before)
    return take_runs(root)


@pytest.mark.slow
def test_a_half_written_dvc_lock_costs_no_work(project: Path) -> None:
    """Cut anywhere: in the head, in a hash, in a number that is one still when it is cut, at ends of lines."""
    lock = project / "dvc.lock"
    good = lock.read_bytes()
    assert bring_up_to_date(project) == []
    middle = good.index(b"  tune@ball:") + 60
    invert = good.index(b"  invert@ball:")
    ends = [good.index(end, invert) + len(end) for end in (b"@ball:\n", b"deps:\n", b"outs:\n", b".dir\n", b"5\n")]
    for cut in (0, 24, middle, *ends, len(good) - 2):
        lock.write_bytes(good[:cut])
        assert bring_up_to_date(project) == [], cut
        assert lock.read_bytes() == good, cut


@pytest.mark.slow
def test_locks_of_dead_processes_are_cleared_and_those_of_living_ones_are_not(project: Path) -> None:
    table = project / ".dvc/tmp/rwlock"
    frames = str(project / f"results/{CLIP}/frames")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    living = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    try:
        entries = [
            {"write": {frames: {"pid": dead.pid, "cmd": "dvc repro"}}, "read": {}},
            {"write": {}, "read": {frames: [{"pid": dead.pid, "cmd": "dvc repro"}]}},
        ]
        for text in ("", '{"write": {', "[]", *map(json.dumps, entries)):
            table.write_text(text)
            (project / f"results/{CLIP}/frames/source.mp4").unlink()
            assert bring_up_to_date(project) == [], text
            assert not any(json.loads(table.read_text()).values())

        # Another process has the number of the dead one by now: it is younger than the table.
        held = json.dumps({"write": {frames: {"pid": living.pid, "cmd": "dvc repro"}}, "read": {}})
        table.write_text(held)
        os.utime(table, (time.time() - 3600,) * 2)
        assert bring_up_to_date(project) == []

        table.write_text(held)
        with pytest.raises(TavError, match=f"DVC is in use here by process {living.pid}"):
            bring_up_to_date(project)
        assert json.loads(table.read_text()) == json.loads(held)
    finally:
        living.kill()
        living.wait()
