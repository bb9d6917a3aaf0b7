"""The local services: what they refuse in one line, what they start, restart and stop, and that they leave the terminal."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from flows import services
from tav_model.errors import TavError
from tests.support.projects import change_params, environment, fresh_clone, run
from tests.support.servers import free_port
from tests.support.tav_command import change


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fresh_clone(tmp_path_factory.mktemp("project"))


def refused(project: Path, **settings: str) -> str:
    done = run(project, "python", "-m", "flows.services", check=False, **settings)
    assert done.returncode == 2, done.stdout
    (line,) = done.stdout.splitlines()
    return line


def test_a_port_that_is_taken(project: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"error: port {port} is taken" in refused(project, PREFECT_API_URL=f"http://127.0.0.1:{port}/api")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            prefect = f"http://127.0.0.1:{free.getsockname()[1]}/api"
        assert f"error: port {port} is taken" in refused(project, PREFECT_API_URL=prefect, TAV_MLFLOW_PORT=str(port))


def test_where_nothing_is_tracked_no_port_is_needed_for_it(project: Path) -> None:
    params = project / "params.yaml"
    text = params.read_text()
    change_params(project, {"tracking": {"uri": None}})
    try:
        with socket.socket() as prefect, socket.socket() as mlflow:
            for other in (prefect, mlflow):
                other.bind(("127.0.0.1", 0))
                other.listen()
            port, taken = prefect.getsockname()[1], str(mlflow.getsockname()[1])
            line = refused(project, PREFECT_API_URL=f"http://127.0.0.1:{port}/api", TAV_MLFLOW_PORT=taken)
            assert f"error: port {port} is taken" in line
    finally:
        params.write_text(text)


def test_an_address_of_another_machine(project: Path) -> None:
    line = refused(project, PREFECT_API_URL="http://192.0.2.1:4200/api")
    assert "must be http://127.0.0.1:PORT/api" in line


def test_a_port_setting_that_is_not_a_port(project: Path) -> None:
    assert "TAV_MLFLOW_PORT: 'many' must be a port" in refused(project, TAV_MLFLOW_PORT="many")


def test_mlflows_page_is_the_list_of_runs_once_the_server_knows_the_experiment(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        asked.append(url)
        return io.BytesIO(b'{"experiment": {"experiment_id": "12"}}')

    address = "http://127.0.0.1:5000"
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    assert services.mlflow_page(project, address).startswith(f"{address}/#/experiments/12/runs?workflowType=")
    assert asked == [f"{address}/api/2.0/mlflow/experiments/get-by-name?experiment_name=tav"]
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"<html>"))
    assert services.mlflow_page(project, address) == address


def listening(process: int) -> set[tuple[str, int]]:
    """The addresses on which a process and its descendants listen."""
    main = psutil.Process(process)
    found = set()
    for one in (main, *main.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= {tuple(c.laddr) for c in one.net_connections("inet") if c.status in ("LISTEN", "NONE")}
    return found


def arguments(process: int) -> str:
    main = psutil.Process(process)
    found: list[str] = []
    for one in (main, *main.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += one.cmdline()
    return " ".join(found)


def tav_in_a_terminal(project: Path, command: str, settings: dict[str, str]) -> str:
    """The output of a command through a pipe, read until no process holds the pipe or the user's terminal any more."""
    reader, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "tav_cli.main", command],
        cwd=project,
        env=environment(**settings),
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=terminal,
        start_new_session=True,
        text=True,
    )
    os.close(terminal)
    errors = threading.Thread(target=_drain, args=[reader])
    errors.start()
    try:
        # As scripts, CI runners and `subprocess.run` wait: for the end of the output, not only of the process.
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
        errors.join(10)
        assert not errors.is_alive(), "a process keeps the terminal open"
    finally:
        process.kill()
    return output


def _drain(terminal: int) -> None:
    """Read what a terminal receives until its last user has closed it."""
    with contextlib.suppress(OSError):
        while os.read(terminal, 1000):
            pass
    os.close(terminal)


def get(address: str) -> int:
    with urllib.request.urlopen(address, timeout=10) as answer:
        return answer.status


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_up_starts_everything_detached_from_the_terminal_and_down_stops_it(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = f"http://127.0.0.1:{free_port()}/api"
    settings = {"TAV_MLFLOW_PORT": str(free_port()), "HOME": str(tmp_path)}
    change(project / "prefect.toml", "http://127.0.0.1:4200/api", api)

    def tav(command: str, check: bool = True) -> str:
        return run(project, sys.executable, "-m", "tav_cli.main", command, check=check, **settings).stdout

    try:
        printed = tav_in_a_terminal(project, "up", settings)
        addresses = re.findall(r"http://127\.0\.0\.1:\d+", printed)
        assert [get(address) for address in addresses] == [200, 200]
        assert "deployment run tav/edit-batch" in printed
        process = json.loads((project / ".tav" / "services.lock").read_text())["process"]
        places = listening(process)
        assert {host for host, _ in places} == {"127.0.0.1"}
        assert {port for _, port in places} >= {int(address.rpartition(":")[2]) for address in addresses}
        assert "sqlite" not in arguments(process)  # Another database's address would have a password.
        # What a user types in the project finds this server.
        typed = run(project, sys.executable, "-m", "prefect", "deployment", "inspect", "tav/edit-batch", **settings)
        assert "flows.tav.tav" in typed.stdout
        assert (project / ".tav/prefect/prefect.db").stat().st_size and not list(tmp_path.glob(".prefect/*.db"))
        assert {path.name for path in (project / "logs").iterdir()} >= {
            f"{name}.log" for name in ("services", "prefect-server", "prefect-worker", "mlflow-server")
        }
        check_that_another_clone_does_not_use_it(project, tmp_path / "other", api, monkeypatch)
        assert "already running (process" in tav("up", check=False)
        assert "already running (process" in refused(project, **settings)
    finally:
        assert tav("down") == "stopped\n"
    for address in addresses:
        with pytest.raises(urllib.error.URLError, match="refused"):
            get(address)
    # A lock file of a process that was killed does not count.
    assert (project / ".tav" / "services.lock").exists()
    assert tav("down") == "not running\n"


def check_that_another_clone_does_not_use_it(
    project: Path, other: Path, api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second clone has the same address in its prefect.toml."""
    other.mkdir()
    shutil.copy(project / "prefect.toml", other)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    assert services.served_project(api) == project
    assert services.serving_api(project) == api and services.serving_api(other) is None
    with pytest.raises(TavError, match=f"is taken; stop the services of {project}, or choose another port"):
        services._check_free(int(api.split(":")[2].split("/")[0]), "prefect.toml: api.url", api)
    monkeypatch.setenv("PREFECT_API_URL", api)  # Here somebody wants it so.
    assert services.serving_api(other) == api


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_process_that_ends_again_and_again_stops_everything(project: Path, tmp_path: Path) -> None:
    ports = {"PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api", "TAV_MLFLOW_PORT": str(free_port())}
    settings = ports | {"PREFECT_HOME": str(tmp_path / "prefect")}
    run(project, sys.executable, "-m", "tav_cli.main", "up", **settings)
    killed: set[int] = set()
    log = project / "logs/services.log"
    end = time.monotonic() + 200
    while "again and again" not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                is_worker = "prefect worker start" in " ".join(process.cmdline())
                if is_worker and process.cwd() == str(project) and process.pid not in killed:
                    killed.add(process.pid)
                    process.kill()
        time.sleep(0.2)
    assert len(killed) == log.read_text().count("restarting it") + 1 == 4
    assert "prefect-worker ended (signal 9), restarting it" in log.read_text()
    while run(project, sys.executable, "-m", "tav_cli.main", "down", **settings).stdout != "not running\n":
        assert time.monotonic() < end


def test_the_lock_names_the_process_and_its_addresses(tmp_path: Path) -> None:
    assert services.running(tmp_path) is None
    with services._only_one(tmp_path, "http://a", "http://b"):
        assert services.running(tmp_path) == services.Services(os.getpid(), "http://a", "http://b")
        with pytest.raises(TavError, match="already running"), services._only_one(tmp_path, "c", "d"):
            pass
    assert services.running(tmp_path) is None
    with (tmp_path / ".tav/services.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
