"""A run that is killed at any moment resumes by the same command, bit-identical to one that never was."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import killing
from tests.support.killing import (
    MEND,
    MOMENTS,
    Command,
    Forked,
    by_dvc,
    by_flow,
    check_complete,
    check_no_process_is_left,
    check_same,
    copies,
    dvc_lock_is_half_written,
    dvc_refuses,
    kill_after,
    kill_when,
    wait,
)
from tests.support.projects import run

SEED = 20221222
Start = Callable[[Path], Command | Forked]


def resume(project: Path, start: Start, reference: Path) -> None:
    """Run the same command again, to the end."""
    wait(start(project))
    check_same(project, reference)


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while(moment: str, forked: tuple[Path, Path, float], tmp_path: Path) -> None:
    template, reference, _ = forked
    project = next(copies(template, tmp_path))
    assert kill_when(Forked(project), project, MOMENTS[moment])
    assert MOMENTS[moment](project), "what was half-written has to be there still, for the next run to clear"
    check_complete(project)
    for copy in killing.half_copies(project):
        os.utime(copy, (0, 0))  # Half copies are cleared when nobody has written to them for a while.
    resume(project, Forked, reference)
    assert killing.half_copies(project) == []


def killed_again_and_again(
    count: int, start: Start, template: Path, reference: Path, seconds: float, folder: Path
) -> None:
    """Kill `count` runs, each the same command that goes on; one that ends before begins anew in a fresh project."""
    draw = random.Random(SEED)
    projects = copies(template, folder)
    project, killed, opened, finished, mended = next(projects), 0, 0, 0, 0
    while killed < count:
        if start is by_dvc and dvc_refuses(project):
            mended += 1
            run(project, *MEND)
        if kill_after(start(project), draw.uniform(0, seconds)):
            killed += 1
            opened += check_complete(project)
            check_no_process_is_left(project)
        else:
            check_same(project, reference)
            finished += 1
            project = next(projects)
    if start is by_dvc and dvc_refuses(project):
        mended += 1
        run(project, *MEND)
    resume(project, start, reference)
    print(f"{killed} kills, {finished + 1} runs to the end, {opened} complete files opened, {mended} mended")


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("count", [2, pytest.param(40, marks=pytest.mark.long)])
def test_killed_at_random(count: int, forked: tuple[Path, Path, float], tmp_path: Path) -> None:
    template, reference, seconds = forked
    killed_again_and_again(count, Forked, template, reference, seconds, tmp_path)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, float]]:
    """As `forked`, with MLflow, and the seconds by each entry point; both leave the same."""
    folder = tmp_path_factory.mktemp("entry-points")
    template = killing.make_project(folder / "template")
    reference = Path(shutil.copytree(template, folder / "by-dvc"))
    seconds = {"dvc": wait(by_dvc(reference))}
    other = Path(shutil.copytree(template, folder / "by-flow"))
    seconds["flow"] = wait(by_flow(other))
    check_same(other, reference)
    return template, reference, seconds


ENTRY_POINTS: dict[str, Start] = {"dvc": by_dvc, "flow": by_flow}


@pytest.mark.long
@pytest.mark.timeout(7000)
@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_entry_points_killed_at_random(
    entry_point: str, tracked: tuple[Path, Path, dict[str, float]], tmp_path: Path
) -> None:
    template, reference, seconds = tracked
    killed_again_and_again(20, ENTRY_POINTS[entry_point], template, reference, seconds[entry_point], tmp_path)


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_entry_points_killed_while(
    entry_point: str, moment: str, tracked: tuple[Path, Path, dict[str, float]], tmp_path: Path
) -> None:
    template, reference, _ = tracked
    project = next(copies(template, tmp_path))
    assert kill_when(ENTRY_POINTS[entry_point](project), project, MOMENTS[moment])
    check_complete(project)
    resume(project, ENTRY_POINTS[entry_point], reference)


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_dvc_killed_while_it_writes_dvc_lock(tracked: tuple[Path, Path, dict[str, float]], tmp_path: Path) -> None:
    """DVC writes dvc.lock in place, and refuses what it was killed at; any command of ours mends that."""
    template, reference, _ = tracked
    project = next(copies(template, tmp_path))
    assert kill_when(by_dvc(project), project, dvc_lock_is_half_written)
    assert dvc_refuses(project)
    assert "dvc.lock" in run(project, "dvc", "repro", check=False).stdout
    run(project, *MEND)
    resume(project, by_dvc, reference)
