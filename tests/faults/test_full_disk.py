"""A full disk ends a stage with one line; nothing half-written has a final name, and with room the stage resumes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tav.config.stages import STAGES
from tests.support import killing
from tests.support.killing import CLIP, Command, check_complete, wait
from tests.support.projects import run

OUTPUTS = {
    "decode": ["frames"],
    "encode": ["latents"],
    "annotate": ["control"],
    "tune": ["tuned"],
    "invert": ["inverted"],
    "edit": ["edits"],
    "score": ["scores", "contact-sheet.png"],
}
WRITING = [stage for stage in STAGES if stage != "annotate"]  # Without control, that one writes next to nothing.
LARGEST = 3000  # bytes: each stage has a file that is larger
ROOM = re.compile(r"\(\d+\.\d of \d+\.\d [MG]B free\)")


@pytest.fixture
def finished(forked: tuple[Path, Path, float]) -> Path:
    """Return a project after a run."""
    return forked[1]


def stage_in(project: Path, stage: str, output: Path, most: int | None = None) -> tuple[int, str]:
    """Exit code and output of `python -m tasks STAGE`, in a process that is forked with all modules imported."""
    from tests.support.fault_pipeline import run_stage

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.fault_pipeline"])
    process = context.Process(target=run_stage, args=(project, CLIP, stage, output, most))
    process.start()
    process.join(300)
    assert process.exitcode is not None
    return process.exitcode, output.read_text()


def take_back(project: Path, stage: str) -> dict[str, bytes]:
    """Undo a stage and those that depend on it; return the contents of its outputs."""
    results = project / "results" / CLIP
    before = {name: contents(results / name) for name in OUTPUTS[stage]}
    for later in STAGES[STAGES.index(stage) :]:
        for name in OUTPUTS[later]:
            (shutil.rmtree if (results / name).is_dir() else Path.unlink)(results / name)
    if stage == "edit":
        shutil.rmtree(project / ".tav/rows")
        shutil.rmtree(project / ".dvc/cache")  # where the rows would be found
    return {f"{name}/{file}": data for name, files in before.items() for file, data in files.items()}


def contents(path: Path) -> dict[str, bytes]:
    files = [one for one in path.rglob("*") if one.is_file()] if path.is_dir() else [path]
    return {one.relative_to(path).as_posix(): one.read_bytes() for one in files}


def outputs(project: Path, stage: str) -> dict[str, bytes]:
    results = project / "results" / CLIP
    found = {name: contents(results / name) for name in OUTPUTS[stage] if (results / name).exists()}
    return {f"{name}/{file}": data for name, files in found.items() for file, data in files.items()}


def check_one_line(said: str, what: str) -> None:
    lines = [line for line in said.splitlines() if not line.startswith(("warning: ", f"{what} "))]
    assert len(lines) == 1 and lines[0].startswith("error: "), said
    assert "Traceback" not in said
    assert "the same command resumes from here" in lines[0], said


@pytest.mark.parametrize("stage", WRITING)
def test_a_file_that_finds_no_room(stage: str, finished: Path, tmp_path: Path) -> None:
    """By a limit on the size of files, which needs no other disk: each library's own writing meets it."""
    project = Path(shutil.copytree(finished, tmp_path / "project", symlinks=True))
    expected = take_back(project, stage)
    code, said = stage_in(project, stage, tmp_path / "output", LARGEST)
    assert code == 1, said
    check_one_line(said, stage)
    place = tempfile.gettempdir() if stage == "decode" else f"project/results/{CLIP}/|project/.tav/"
    assert re.search(f"error: {stage}: .*({place}).*: larger than a file may be", said), said
    check_complete(project)
    assert killing.leftovers(project) == []
    assert all(expected[name] == data for name, data in outputs(project, stage).items())
    code, said = stage_in(project, stage, tmp_path / "output")
    assert code == 0, said
    assert outputs(project, stage) == expected


# A disk of its own


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: float) -> Iterator[Path]:
    folder.mkdir()
    options = f"size={int(megabytes * 1e6)}"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tav-test", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Take all room but `leave` bytes; returns the file that does."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file, contextlib.suppress(OSError):
        os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(disk).free - leave))
    return ballast


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("stage", WRITING)
def test_a_disk_of_any_room(stage: str, finished: Path, tmp_path: Path) -> None:
    """From none at all to nearly enough."""
    draw = random.Random(stage)
    full = 0
    for leave in (0, 4096, *(int(2 ** draw.uniform(12, 21)) for _ in range(6))):
        with small_disk(tmp_path / f"disk-{leave}", 200) as disk:
            project = Path(shutil.copytree(finished, disk / "project", symlinks=True))
            expected = take_back(project, stage)
            ballast = fill(disk, leave)
            code, said = stage_in(project, stage, tmp_path / "output")
            if code:
                full += 1
                assert code == 1, said
                check_one_line(said, stage)
                assert ROOM.search(said), said
            check_complete(project)
            assert killing.leftovers(project) == []
            assert all(expected[name] == data for name, data in outputs(project, stage).items())
            ballast.unlink()
            code, said = stage_in(project, stage, tmp_path / "output")
            assert code == 0, said
            assert outputs(project, stage) == expected
    assert full >= 2
    print(f"{stage}: {full} full disks")


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("entry_point", ["dvc", "flow"])
@pytest.mark.parametrize("leave", [1_000_000, 20_000])
def test_entry_points_on_a_full_disk(entry_point: str, leave: int, finished: Path, tmp_path: Path) -> None:
    """DVC's cache is on the disk too."""
    command = ["dvc", "repro"] if entry_point == "dvc" else [sys.executable, "-m", "tav_cli.main", "run", CLIP]
    with small_disk(tmp_path / "disk", 200) as disk:
        project = Path(shutil.copytree(finished, disk / "project", symlinks=True))
        for folder in ("results", ".tav", ".dvc/cache", "logs"):
            shutil.rmtree(project / folder)
        (project / "dvc.lock").unlink()
        ballast = fill(disk, leave)
        done = run(project, *command, check=False, PREFECT_HOME=str(tmp_path / "prefect"))
        assert done.returncode, done.stdout
        assert "Traceback" not in done.stdout and re.search("no room left|No space left", done.stdout), done.stdout
        check_complete(project)
        ballast.unlink()
        if entry_point == "dvc" and killing.dvc_refuses(project):
            run(project, *killing.MEND)
        wait(Command(project, *command, PREFECT_HOME=str(tmp_path / "prefect")))
        killing.check_same(project, finished)
