"""Runs of the pipeline that are killed, and what must be true of the project after that."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import yaml

from tav.config import no_own_settings
from tests.support.models import small_base
from tests.support.projects import change_params, environment, fresh_clone

CLIP, OTHER = "ball", "another-ball"
STEPS, EVERY = 24, 2
SETTINGS = {
    "base_model": "models/tiny",
    "decode": {"frames": 4, "width": 64, "height": 64},
    "tune": {"steps": STEPS},
    "invert": {"steps": 3},
    "edit": {"steps": 3},
    "score": {"clip_model": None},
    "runtime": {"checkpoint_every": EVERY, "device": "cpu"},
}
ROWS = ("a blue ball is bouncing", "a ball on the moon", "a green ball at night")
# Any command of ours that looks at the project mends what DVC refuses.
MEND = (sys.executable, "-m", "tav_cli.main", "status")
SLICE = 0.003  # seconds that a watched run goes on between two looks

Moment = Callable[[Path], bool]


def make_project(folder: Path, *clips: str, **settings: object) -> Path:
    """A fresh clone with a model and clips (one, unless named) so small that importing torch takes most of the time."""
    project = fresh_clone(folder)
    small_base(project / "models/tiny")
    clip = {"video": "data/ball.mp4", "caption": "a red ball", "prompts": "data/ball.csv", **no_own_settings()}
    change_params(project, SETTINGS | settings, dict.fromkeys(clips or (CLIP,), clip))
    (project / "data/ball.csv").write_text("\n".join(["prompt", *ROWS, ""]))
    return project


# Ways to run it


class Command:
    """A run by a command line of its own, in a process group of its own."""

    def __init__(self, project: Path, *command: str, **variables: str) -> None:
        self.output = Path(tempfile.mkstemp(".output", dir=project.parent)[1])
        with self.output.open("w") as output:
            self.process = psutil.Popen(
                command,
                cwd=project,
                env=environment(**variables),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def ended(self) -> int | None:
        return self.process.poll()

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.process.wait()


class Forked:
    """A run of the stages with their commits in a process that is forked with all modules imported: no second is lost."""

    def __init__(self, project: Path, clip: str = CLIP) -> None:
        self.output = project.parent / f"{project.name}.{clip}.output"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.support.fault_pipeline"])
        from tests.support.fault_pipeline import run_pipeline

        self._process = context.Process(target=run_pipeline, args=(project, clip, self.output))
        self._process.start()

    def ended(self) -> int | None:
        return self._process.exitcode

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def by_dvc(project: Path, *targets: str) -> Command:
    return Command(project, "dvc", "repro", *targets)


def by_flow(project: Path) -> Command:
    home = project.parent / "prefect"
    return Command(project, sys.executable, "-m", "tav_cli.main", "run", CLIP, PREFECT_HOME=str(home))


def wait(run: Command | Forked, seconds: float = 400) -> float:
    """Wait for the end of a run; return how long it took."""
    start = time.monotonic()
    while run.ended() is None:
        assert time.monotonic() < start + seconds, run.output.read_text()
        time.sleep(0.02)
    assert run.ended() == 0, run.output.read_text()
    return time.monotonic() - start


def kill_after(run: Command | Forked, seconds: float) -> bool:
    """Kill the run after so many seconds; return False where it has ended before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if run.ended() is not None:
            assert run.ended() == 0, run.output.read_text()
            return False
        time.sleep(0.005)
    run.kill()
    return True


def stop_when(run: Command | Forked, project: Path, moment: Moment, seconds: float = 400) -> bool:
    """Stop the run at the first such moment; it is stopped for each look, so that none is missed."""
    end = time.monotonic() + seconds
    while run.ended() is None:
        assert time.monotonic() < end, run.output.read_text()
        run.send(signal.SIGSTOP)
        if moment(project):
            return True
        run.send(signal.SIGCONT)
        time.sleep(SLICE)
    assert run.ended() == 0, run.output.read_text()
    return False


def kill_when(run: Command | Forked, project: Path, moment: Moment) -> bool:
    """Kill the run at the first such moment."""
    stopped = stop_when(run, project, moment)
    if stopped:
        run.kill()
    return stopped


# Moments to kill it


def checkpoint_is_being_written(project: Path, clip: str = CLIP) -> bool:
    return any((project / ".tav/checkpoints" / clip).glob(".tmp-*/*.safetensors"))


def video_is_being_written(project: Path) -> bool:
    return any(path for folder in (project / ".tav/rows" / CLIP).glob(".tmp-*") for path in folder.rglob("*.mp4"))


def results_are_being_written(project: Path) -> bool:
    return any((project / "results" / CLIP).glob(".tmp-*/tuned/*"))


def cache_gets_its_first_file(project: Path) -> bool:
    return any((project / ".dvc/cache/files").glob("md5/*/*"))


def dvc_lock_is_half_written(project: Path) -> bool:
    path = project / "dvc.lock"
    return path.exists() and not path.read_bytes().endswith(b"\n")


MOMENTS = {
    "checkpoint": checkpoint_is_being_written,
    "video": video_is_being_written,
    "results": results_are_being_written,
    "cache": cache_gets_its_first_file,
}


def dvc_refuses(project: Path) -> bool:
    """Whether DVC was killed while it wrote, in place, what it will not read again."""
    table = project / ".dvc/tmp/rwlock"
    return dvc_lock_is_half_written(project) or (table.exists() and not table.read_text().endswith("}"))


# What must be true


def check_complete(project: Path) -> int:
    """Check that every file under a final name is complete; return how many were opened."""
    count = 0
    for folder in ("results", ".tav", "data"):
        for path in sorted((project / folder).rglob("*")):
            if path.is_file() and not _is_temporary(path.relative_to(project)):
                count += _opens(path)
    for path in (project / ".dvc/cache/files/md5").glob("[0-9a-f][0-9a-f]/*"):
        if not path.name.endswith(".tmp") and not _is_tried_clone(path):
            content = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
            assert path.parent.name + path.name.removesuffix(".dir") == content, f"{path} is not what its name says"
            count += 1
    return count


def _is_tried_clone(path: Path) -> bool:
    """DVC tries to clone a file before it copies it; killed in that instant, it leaves this, and does not take it for it."""
    return path.stat().st_size == 0 and path.stat().st_mode & 0o222 != 0


def _is_temporary(path: Path) -> bool:
    return any(part.startswith(".tmp-") for part in path.parts)


def _opens(path: Path) -> bool:
    """Read the file, which raises its reader's error where it is incomplete; return False for files of other kinds."""
    from PIL import Image

    from tav_model.digests import digest
    from tav_model.tensors import load_tensors
    from tav_model.video import read_video

    if path.suffix == ".safetensors":
        load_tensors(path)
    elif path.suffix == ".json":
        record = json.loads(path.read_text())
        if path.name == "edit.json" and path.parent.name != "control":
            assert record["video"] == digest(path.with_suffix(".mp4"))
    elif path.suffix == ".csv":
        with path.open(newline="") as file:
            assert len({len(row) for row in csv.reader(file)}) == 1, path
    elif path.suffix == ".mp4":
        read_video(path)
    elif path.suffix in (".png", ".webp"):
        with Image.open(path) as image:
            image.load()
    else:
        return False
    return True


def check_same(project: Path, reference: Path) -> None:
    """Check that results are bit-identical to those of a run that was never killed, and that nothing is left over."""
    assert (project / "dvc.lock").read_bytes() == (reference / "dvc.lock").read_bytes()
    check_same_results(project, reference)


def check_entry_points_and_a_kill(template: Path, folder: Path, moment: Moment) -> Path:
    """Check that both entry points and a run that is killed at a moment have the same results; return a project with them.

    Args:
        template: a project in which nothing has run.
        folder: for copies of it.
        moment: when DVC's run is killed, which is then resumed.
    """
    finished, other, killed = (
        Path(shutil.copytree(template, folder / name)) for name in ("by-dvc", "by-flow", "killed")
    )
    score = f"score@{CLIP}"
    wait(by_dvc(finished, score))
    wait(by_flow(other))
    check_same(other, finished)
    assert kill_when(by_dvc(killed, score), killed, moment)
    wait(by_dvc(killed, score))
    check_same(killed, finished)
    return finished


def check_same_results(project: Path, reference: Path) -> None:
    """`check_same` for runs beside each other, whose entries in dvc.lock have no certain order."""
    locks = [yaml.safe_load((root / "dvc.lock").read_text()) for root in (project, reference)]
    assert locks[0] == locks[1]
    assert _results(project) == _results(reference)
    assert leftovers(project) == []
    assert not any(_is_tried_clone(path) for path in (project / ".dvc/cache/files/md5").glob("??/*"))
    assert not any((project / ".tav/checkpoints").glob("*"))


def leftovers(project: Path) -> list[str]:
    """Temporary files and folders of killed runs."""
    ours = [path for path in project.rglob(".tmp-*") if ".git" not in path.parts]
    return sorted(path.relative_to(project).as_posix() for path in ours)


def half_copies(project: Path) -> list[Path]:
    """What DVC had copied into its cache by half."""
    return list((project / ".dvc/cache").rglob("*.tmp"))


def _results(project: Path) -> dict[str, str]:
    """Digests of all that DVC keeps of the results."""
    return {
        path.relative_to(project).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (project / "results").rglob("*")
        if path.is_file() and path.suffix != ".html"
    }


def processes_in(project: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(project) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def check_no_process_is_left(project: Path, seconds: float = 30) -> None:
    """What a run starts outside of its process group ends by itself."""
    end = time.monotonic() + seconds
    while left := processes_in(project):
        assert time.monotonic() < end, left
        time.sleep(0.1)


def copies(template: Path, folder: Path) -> Iterator[Path]:
    """Copies of a project, one after the other."""
    number = 0
    while True:
        number += 1
        yield Path(shutil.copytree(template, folder / f"project-{number}", symlinks=True))
