"""`python -m flows.serve` before anything is started: what it refuses, in one line."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.projects import fresh_clone, run


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fresh_clone(tmp_path_factory.mktemp("project"))


def refused(project: Path, **settings: str) -> str:
    done = run(project, "python", "-m", "flows.serve", check=False, **settings)
    assert done.returncode == 2, done.stdout
    (line,) = done.stdout.splitlines()
    return line


def test_a_port_that_is_taken(project: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"error: port {port} is taken" in refused(project, PREFECT_API_URL=f"http://127.0.0.1:{port}/api")
        assert f"error: port {port} is taken" in refused(project, TAV_MLFLOW_PORT=str(port))


def test_an_address_of_another_machine(project: Path) -> None:
    line = refused(project, PREFECT_API_URL="http://192.0.2.1:4200/api")
    assert "must be http://127.0.0.1:PORT/api" in line


def test_a_port_that_is_none(project: Path) -> None:
    assert "TAV_MLFLOW_PORT: 'many' must be a port" in refused(project, TAV_MLFLOW_PORT="many")
