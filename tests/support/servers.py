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

from tests.support.projects import environment, run


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


def task_runs(prefect: dict[str, str], project: Path) -> list[str]:
    """The names of all task runs that the server knows, in the order they started."""
    script = """
import asyncio, json
from prefect import get_client
async def main():
    async with get_client() as client:
        runs = await client.read_task_runs(limit=200)
        print("TASKS", json.dumps([r.name for r in sorted(runs, key=lambda r: r.start_time)]))
asyncio.run(main())
"""
    text = run(project, "python", "-c", script, **prefect).stdout
    return json.loads(next(line for line in text.splitlines() if line.startswith("TASKS "))[6:])


def artifacts(prefect: dict[str, str], project: Path) -> dict[str, tuple[str, object]]:
    """Type and data of the latest artifact of each key."""
    script = """
import asyncio, json
from prefect import get_client
async def main():
    async with get_client() as client:
        found = await client.read_artifacts(limit=200)
        found.sort(key=lambda a: a.updated)
        print("ARTIFACTS", json.dumps({a.key: (a.type, a.data) for a in found}))
asyncio.run(main())
"""
    text = run(project, "python", "-c", script, **prefect).stdout
    return json.loads(next(line for line in text.splitlines() if line.startswith("ARTIFACTS "))[10:])


def run_deployment(project: Path, prefect: dict[str, str], *parameters: str) -> None:
    given = [word for parameter in parameters for word in ("--param", parameter)]
    done = run(project, "prefect", "deployment", "run", "tav/edit-batch", "--watch", *given, check=False, **prefect)
    log = (project / "logs" / "prefect-worker.log").read_text()
    assert done.returncode == 0, f"{done.stdout}\n{log}"


def flow_states(prefect: dict[str, str], project: Path) -> list[str]:
    """The states of all flow runs."""
    script = """
import asyncio, json
from prefect import get_client
async def main():
    async with get_client() as client:
        print("STATES", json.dumps([r.state.type.value for r in await client.read_flow_runs()]))
asyncio.run(main())
"""
    text = run(project, "python", "-c", script, **prefect).stdout
    return json.loads(next(line for line in text.splitlines() if line.startswith("STATES "))[7:])
