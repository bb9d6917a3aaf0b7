"""Servers that are killed in the middle of a run and come back: the run continues, and in the end both have all of it."""

from __future__ import annotations

import re
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.support.killing import CLIP, make_project
from tests.support.projects import run
from tests.support.servers import flow_states, free_port, get, mlflow_server, serving, task_runs

STEPS = 200


def wait_for(what: str, happened: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def kill_prefect_server(project: Path) -> None:
    """The processes of the server, not of the worker or of the run."""
    killed = 0
    for process in psutil.process_iter():
        try:
            words = " ".join(process.cmdline())
            if process.cwd() == str(project) and re.search("prefect server start|prefect.server.api", words):
                process.send_signal(signal.SIGKILL)
                killed += 1
        except psutil.Error:
            continue
    assert killed, "no server to kill"


def answers(port: str) -> bool:
    try:
        return bool(get(int(port), "/api/health"))
    except OSError:
        return False


def losses(project: Path) -> list[tuple[int, float]]:
    """The curve that MLflow has of the only tuning."""
    with sqlite3.connect(project / "mlflow.db") as store:
        return store.execute(
            "select metrics.step, metrics.value from metrics join tags on tags.run_uuid = metrics.run_uuid "
            "where tags.key = 'tav.kind' and tags.value = 'tune' and metrics.key = 'loss' order by metrics.step"
        ).fetchall()


def statuses(project: Path) -> set[str]:
    with sqlite3.connect(project / "mlflow.db") as store:
        return {status for (status,) in store.execute("select status from runs")}


@pytest.mark.long
@pytest.mark.timeout(500)
def test_both_servers_are_killed_in_the_middle_of_a_run(tmp_path: Path, prefect: dict[str, str]) -> None:
    port = free_port()
    project = make_project(
        tmp_path / "project",
        tracking={"uri": f"http://127.0.0.1:{port}"},
        tune={"steps": STEPS},
        runtime={"checkpoint_every": 10, "device": "cpu"},
    )
    checkpoints = project / ".tav/checkpoints" / CLIP

    def step() -> int:
        return max((int(path.stem.removeprefix("step-")) for path in checkpoints.glob("step-*.safetensors")), default=0)

    api = prefect["PREFECT_API_URL"].split(":")[-1].removesuffix("/api")
    with serving(project, prefect):
        with mlflow_server(project, port):
            run(project, "prefect", "deployment", "run", "tav/edit-batch", **prefect)
            wait_for("the tuning", lambda: step() >= 20)
            kill_prefect_server(project)
        killed = step()
        wait_for("steps without any server", lambda: step() >= min(killed + 40, STEPS - 40))
        wait_for("Prefect's server again", lambda: answers(api))
        before_the_end = step()
        with mlflow_server(project, port):
            wait_for("the end", lambda: flow_states(prefect) != ["RUNNING"], 200)
            assert flow_states(prefect) == ["COMPLETED"], (project / "logs/prefect-worker.log").read_text()
            known = task_runs(prefect)
    assert {"decode: ball", "tune: ball", "score: ball"} <= set(known) and len(known) == len(set(known))
    assert [step for step, _ in losses(project)] == list(range(1, STEPS + 1))
    assert statuses(project) == {"FINISHED"}
    log = (project / "logs" / CLIP / "tune.log").read_text()
    assert log.count("starts") == 1 and f"{STEPS}/{STEPS} steps" in log
    assert "Traceback" not in log
    print(f"Prefect and MLflow killed at step {killed}, back before step {before_the_end} of {STEPS}")
