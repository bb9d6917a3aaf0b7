"""A flow run that is cancelled stops within seconds, says so everywhere, and the next run resumes where it was."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.support.projects import QUICK, change_params, fresh_clone
from tests.support.servers import ask, flow_states, run_deployment, serving, start_deployment

STEPS, EVERY = 200, 10


def project(folder: Path) -> Path:
    clone = fresh_clone(folder)
    clips = {"ball": {"video": "data/ball.mp4", "caption": "a red ball", "prompts": "data/ball.csv", "decode": {}}}
    change_params(
        clone, QUICK | {"tune": {"steps": STEPS}, "runtime": {"checkpoint_every": EVERY, "device": "cpu"}}, clips
    )
    (clone / "data/ball.csv").write_text("name,prompt\nblue,a blue ball is bouncing\n")
    return clone


def wait_for(what: str, happened: Callable[[], object], seconds: float = 120) -> float:
    """How long it took."""
    start = time.monotonic()
    while not happened():
        assert time.monotonic() < start + seconds, what
        time.sleep(0.2)
    return time.monotonic() - start


def flow_processes(clone: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(clone) and "prefect.engine" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def status_of(clone: Path, kind: str) -> str:
    with sqlite3.connect(clone / "mlflow.db") as store:
        (status,) = store.execute(
            "select status from runs join tags on tags.run_uuid = runs.run_uuid "
            "where tags.key = 'tav.kind' and tags.value = ?",
            [kind],
        ).fetchone()
    return status


def logged(clone: Path, metric: str) -> list[float]:
    with sqlite3.connect(clone / "mlflow.db") as store:
        return [value for (value,) in store.execute("select value from metrics where key = ?", [metric])]


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_cancelled_and_resumed(tmp_path: Path, prefect: dict[str, str]) -> None:
    clone = project(tmp_path / "project")
    checkpoints = clone / ".tav" / "checkpoints" / "ball"
    with serving(clone, prefect):
        flow_run = start_deployment(prefect)
        wait_for("a checkpoint", lambda: any(checkpoints.glob("step-*.safetensors")))
        assert len(flow_processes(clone)) >= 1
        ask(prefect, f"flow_runs/{flow_run}/set_state", {"state": {"type": "CANCELLING"}})
        taken = wait_for("the end of the flow's processes", lambda: not flow_processes(clone), 60)
        assert taken < 45  # what ends the stage takes no longer than a step
        wait_for("cancelled", lambda: flow_states(prefect) == ["CANCELLED"], 30)
        assert status_of(clone, "tune") == status_of(clone, "pipeline") == "KILLED"
        kept = max(int(path.stem.removeprefix("step-")) for path in checkpoints.glob("step-*.safetensors"))
        assert EVERY <= kept < STEPS

        run_deployment(clone, prefect)
        assert sorted(flow_states(prefect)) == ["CANCELLED", "COMPLETED"]
    assert status_of(clone, "tune") == status_of(clone, "pipeline") == "FINISHED"
    assert len((clone / "results/ball/tuned/loss.csv").read_text().splitlines()) == STEPS + 1
    log = (clone / "logs/ball/tune.log").read_text()
    assert f"tune ball: resumes at {kept}/{STEPS} steps" in log and f"tune ball: done, {STEPS}/{STEPS} steps" in log
    rates = logged(clone, "steps_per_second")
    assert STEPS - kept <= len(rates) <= STEPS and max(rates) < 500  # none of the steps that were loaded
    print(f"cancelled in {taken:.1f} s at step {kept}")
