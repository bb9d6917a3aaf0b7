"""Real servers of a test's own, on free ports, and what they know."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.projects import environment


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(project: Path, prefect: dict[str, str]) -> Iterator[None]:
    """Server, deployment, worker and MLflow UI, as the README starts them."""
    log = project / "services.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            ["python", "-m", "flows.services"], cwd=project, env=environment(**prefect), stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + 180
        while "ready:" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        assert process.wait(60) == 0


@contextlib.contextmanager
def mlflow_server(root: Path, port: int) -> Iterator[subprocess.Popen]:
    """`mlflow server` as `tav up` starts it, in the project's root."""
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", "sqlite:///mlflow.db", "--workers", "1"]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        cwd=root,
        env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                # Asks the store too, which the server opens on the first request.
                get(port, "/api/2.0/mlflow/experiments/get?experiment_id=0", timeout=60)
                break
            except OSError:
                assert process.poll() is None, "the server ended"
                assert time.monotonic() < deadline, "the server does not start"
                time.sleep(0.2)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def get(port: int, path: str, timeout: float = 20) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=timeout) as answer:
        return answer.read()


def ask(prefect: dict[str, str], path: str, body: object = None) -> Any:
    """Return the answer of Prefect's API to a POST of `body`, or to a GET where it is None."""
    request = urllib.request.Request(
        f"{prefect['PREFECT_API_URL']}/{path}",
        None if body is None else json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    for attempt in range(5):
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            # The server asks for another try while its database is locked; Prefect's own client does that.
            if error.code != 503 or attempt == 4:
                raise
            time.sleep(1 + attempt)
    raise AssertionError("unreachable")


def task_runs(prefect: dict[str, str], state: str | None = None) -> list[str]:
    """Return the names of the task runs in a state, or of all, in the order in which they started."""
    runs = [
        one for one in ask(prefect, "task_runs/filter", {"limit": 200}) if state is None or one["state_name"] == state
    ]
    return [one["name"] for one in sorted(runs, key=lambda one: one["start_time"])]


def artifacts(prefect: dict[str, str]) -> dict[str, tuple[str, object]]:
    """Return type and data of the latest artifact of each key."""
    found = ask(prefect, "artifacts/filter", {"limit": 200})
    return {one["key"]: (one["type"], one["data"]) for one in sorted(found, key=lambda one: one["updated"])}


def flow_states(prefect: dict[str, str]) -> list[str]:
    """Return the states of all flow runs."""
    return [one["state"]["type"] for one in ask(prefect, "flow_runs/filter", {})]


def start_deployment(prefect: dict[str, str], **parameters: object) -> str:
    """Start a run of `tav/edit-batch` as Prefect's page does; return its id."""
    deployment = ask(prefect, "deployments/name/tav/edit-batch")["id"]
    return ask(prefect, f"deployments/{deployment}/create_flow_run", {"parameters": parameters})["id"]


def run_deployment(project: Path, prefect: dict[str, str], **parameters: object) -> None:
    """Run `tav/edit-batch` to its end, which must be a success."""
    flow_run = start_deployment(prefect, **parameters)
    deadline = time.monotonic() + 400
    while (state := ask(prefect, f"flow_runs/{flow_run}")["state"])["type"] != "COMPLETED":
        log = project / "logs" / "prefect-worker.log"
        assert state["type"] not in ("FAILED", "CRASHED", "CANCELLED"), f"{state}\n{log.read_text()}"
        assert time.monotonic() < deadline, f"{state}\n{log.read_text()}"
        time.sleep(0.3)
    # The server records task runs from events, which may arrive after the flow has ended.
    while any(run["state_type"] in ("PENDING", "RUNNING") for run in ask(prefect, "task_runs/filter", {"limit": 200})):
        assert time.monotonic() < deadline, "task runs without an end"
        time.sleep(0.3)
