"""A long batch: memory and open files stay level, and the last rows take no longer than the first."""

from __future__ import annotations

import itertools
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from tav.config import no_own_settings
from tests.support.killing import CLIP, Command, make_project
from tests.support.projects import change_params, fresh_clone, run
from tests.support.servers import flow_states, serving


@dataclass(frozen=True)
class Sample:
    """How a process stood when so many rows were done: resident memory (MiB), open files, seconds of CPU and of time."""

    rows: int
    memory: float
    files: int
    cpu: float
    at: float


def watch(process: psutil.Process, project: Path, has_ended: Callable[[], bool]) -> list[Sample]:
    """A sample at the end of each row, but where one ends while another's is taken."""
    samples: list[Sample] = []
    rows = project / ".tav/rows" / CLIP
    while not has_ended():
        done = len(list(rows.glob("[0-9a-f]*/edit.json")))
        if done and (not samples or done > samples[-1].rows):
            try:
                with process.oneshot():
                    cpu, memory = process.cpu_times(), process.memory_info().rss / 2**20
                    files = process.num_fds()
            except psutil.Error:
                break
            samples.append(Sample(done, memory, files, cpu.user + cpu.system, time.monotonic()))
        time.sleep(0.02)
    return samples


def slope(samples: list[Sample], value: Callable[[Sample], float]) -> float:
    """What a row adds, by least squares."""
    return float(np.polyfit([sample.rows for sample in samples], [value(sample) for sample in samples], 1)[0])


def later_by_first(samples: list[Sample], value: Callable[[Sample], float]) -> float:
    """What a row of the last tenth takes, as a multiple of one of the first tenth; medians."""
    each = [
        (value(after) - value(before)) / (after.rows - before.rows) for before, after in itertools.pairwise(samples)
    ]
    tenth = max(1, len(each) // 10)
    return float(np.median(each[-tenth:]) / np.median(each[:tenth]))


def check_level(samples: list[Sample], count: int) -> str:
    """The first rows find caches to fill; after them nothing may grow. Returns the figures."""
    steady = [sample for sample in samples if sample.rows > count // 20 + 2]
    assert len(steady) > count // 2, len(steady)
    memory, files = slope(steady, lambda sample: sample.memory), slope(steady, lambda sample: sample.files)
    cpu, seconds = later_by_first(steady, lambda sample: sample.cpu), later_by_first(steady, lambda sample: sample.at)
    figures = (
        f"{count} rows: memory {steady[0].memory:.0f} to {steady[-1].memory:.0f} MiB ({1024 * memory:+.1f} KiB a row), "
        f"open files {steady[0].files} to {steady[-1].files} ({files:+.4f} a row), last tenth by first: "
        f"CPU time {cpu:.3f}, time {seconds:.3f}"
    )
    # Memory that is freed comes back to the process in pieces: some MiB either way over a whole batch are no leak.
    assert memory * count < 16, figures
    assert files * count < 2, figures
    if count >= 200:
        # Time itself is the machine's matter too, if others use it.
        assert cpu < 1.05 and seconds < 1.3, figures
    return figures


def write_rows(project: Path, count: int) -> None:
    lines = [f"a red ball is bouncing on the grass {number}" for number in range(count)]
    (project / "data/ball.csv").write_text("\n".join(["prompt", *lines, ""]))


@pytest.mark.slow
def test_tav_run(tmp_path: Path) -> None:
    count = 16
    project = make_project(tmp_path / "project", tune={"steps": 2}, invert={"steps": 1}, edit={"steps": 1})
    write_rows(project, count)
    home = str(tmp_path / "prefect")
    batch = Command(project, sys.executable, "-m", "tav_cli.main", "run", CLIP, PREFECT_HOME=home)
    samples = watch(batch.process, project, lambda: batch.ended() is not None)
    assert batch.ended() == 0, batch.output.read_text()
    print(check_level(samples, count))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_edit_batch(tmp_path: Path, prefect: dict[str, str]) -> None:
    """By the deployment, with the embedded model and MLflow."""
    count = 200
    project = fresh_clone(tmp_path / "project")
    clip = {"video": "data/ball.mp4", "caption": "a red ball", "prompts": "data/ball.csv", **no_own_settings()}
    quick = {"tune": {"steps": 4}, "invert": {"steps": 3}, "edit": {"steps": 3}, "runtime": {"device": "cpu"}}
    change_params(project, quick, {CLIP: clip})
    write_rows(project, count)
    with serving(project, prefect):
        run(project, "prefect", "deployment", "run", "tav/edit-batch", **prefect)
        engine = wait_for_engine(project)
        samples = watch(engine, project, lambda: not engine.is_running())
        assert flow_states(prefect) == ["COMPLETED"]
    assert len(list((project / "results" / CLIP / "edits").glob("*.mp4"))) == count
    print(check_level(samples, count))


def wait_for_engine(project: Path) -> psutil.Process:
    """The process in which the worker runs the flow."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        for process in psutil.process_iter():
            try:
                if process.cwd() == str(project) and re.search(r"prefect\.(flow_)?engine", " ".join(process.cmdline())):
                    return process
            except psutil.Error:
                continue
        time.sleep(0.1)
    raise AssertionError("the flow does not start")
