"""Two runs at once in one project: of the same clip, the second is refused in one line; other clips run beside it."""

from __future__ import annotations

import re
import shutil
import signal
import sys
from pathlib import Path

import pytest

from tav.config import no_own_settings
from tests.support.killing import (
    CLIP,
    OTHER,
    Command,
    Forked,
    check_same_results,
    checkpoint_is_being_written,
    copies,
    leftovers,
    make_project,
    stop_when,
    wait,
)
from tests.support.projects import change_params, run

ENTRY_POINTS = {"dvc": ("dvc", "repro", "score@{}"), "flow": (sys.executable, "-m", "tav_cli.main", "run", "{}")}
# What the second run prints, by its own entry point. DVC has two refusals; the first run's entry point decides which.
REFUSALS = {
    "dvc": r"error: tune: the clip ball is in use by process \d+ \(stage tune\); wait for it|is busy, it is being",
    "flow": r"error: (run|(ball: )?tune): the clip ball is in use by process \d+ \(stage tune\); wait for it"
    r"|DVC is in use here by process \d+ ",
}


def command(entry_point: str, clip: str) -> tuple[str, ...]:
    return tuple(word.format(clip) for word in ENTRY_POINTS[entry_point])


def by(entry_point: str, project: Path, clip: str) -> Command:
    return Command(project, *command(entry_point, clip), PREFECT_HOME=str(project.parent / f"prefect-{clip}"))


def check_refused(entry_point: str, project: Path) -> None:
    done = run(project, *command(entry_point, CLIP), check=False, PREFECT_HOME=str(project.parent / "prefect"))
    assert done.returncode and "Traceback" not in done.stdout, done.stdout
    assert re.search(REFUSALS[entry_point], done.stdout), done.stdout


def bits(project: Path, clip: str) -> dict[str, bytes]:
    results = project / "results" / clip
    return {path.name: path.read_bytes() for path in (*results.glob("*/*.safetensors"), *results.glob("edits/*.mp4"))}


@pytest.mark.slow
def test_the_same_clip_is_refused_and_another_is_not(forked: tuple[Path, Path, float], tmp_path: Path) -> None:
    """The first run stands still in the middle of its tuning for as long as the others need."""
    template, reference, _ = forked
    project = next(copies(template, tmp_path))
    first = Forked(project)
    assert stop_when(first, project, checkpoint_is_being_written)
    for entry_point in ENTRY_POINTS:
        check_refused(entry_point, project)
    ball = {"video": "data/ball.mp4", "caption": "a red ball", "prompts": "data/ball.csv", **no_own_settings()}
    change_params(project, {}, {CLIP: ball, OTHER: ball})
    wait(Forked(project, OTHER))
    first.send(signal.SIGCONT)
    wait(first)

    for clip in (CLIP, OTHER):  # the other clip is the same one under another name
        assert bits(project, clip) == bits(reference, CLIP)
    assert leftovers(project) == []
    assert "up to date" in run(project, "dvc", "status").stdout


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("second", ENTRY_POINTS)
@pytest.mark.parametrize("first", ENTRY_POINTS)
def test_entry_points_side_by_side(first: str, second: str, tmp_path: Path) -> None:
    project = make_project(tmp_path / "project", CLIP, OTHER)
    reference = Path(shutil.copytree(project, tmp_path / "reference"))
    for clip in (CLIP, OTHER):
        wait(by("dvc", reference, clip))

    one = by(first, project, CLIP)
    assert stop_when(one, project, checkpoint_is_being_written)
    check_refused(second, project)
    other = by(second, project, OTHER)
    assert stop_when(other, project, lambda project: checkpoint_is_being_written(project, OTHER))
    for process in (one, other):
        process.send(signal.SIGCONT)
    for process in (one, other):
        wait(process)
    check_same_results(project, reference)
    assert "up to date" in run(project, "dvc", "status").stdout
