"""`python -m flows.services`: what it refuses, in one line; what it starts, keeps and ends."""

from __future__ import annotations

import contextlib
import re
import socket
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from tests.support.projects import change_params, fresh_clone, run


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
        assert f"error: port {port} is taken" in refused(project, TAV_MLFLOW_PORT=str(port))


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


def test_a_port_that_is_none(project: Path) -> None:
    assert "TAV_MLFLOW_PORT: 'many' must be a port" in refused(project, TAV_MLFLOW_PORT="many")


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def listening(process: int) -> set[tuple[str, int]]:
    """Where a process and all that it has started listen."""
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


@pytest.mark.timeout(300)
def test_up_starts_all_of_it_and_down_ends_it(project: Path, tmp_path: Path) -> None:
    ports = {"PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api", "TAV_MLFLOW_PORT": free_port()}
    settings = ports | {"PREFECT_HOME": str(tmp_path / "prefect")}

    def serve(command: str, check: bool = True) -> str:
        return run(project, "python", "-m", "flows.services", command, check=check, **settings).stdout

    assert serve("down") == "not running\n"
    said = serve("up")
    try:
        addresses = re.findall(r"http://127\.0\.0\.1:\d+", said)
        assert len(addresses) == 2
        for address in addresses:
            with urllib.request.urlopen(address, timeout=10) as answer:
                assert answer.status == 200
        assert "deployment run tav/edit-batch" in said
        process = int((project / ".tav" / "serve.lock").read_text().split()[0])
        places = listening(process)
        assert {host for host, _ in places} == {"127.0.0.1"}
        assert {port for _, port in places} >= {int(address.rpartition(":")[2]) for address in addresses}
        assert "sqlite" not in arguments(process)  # Another database's address would have a password.
        assert "already running (process" in serve("up", check=False)
        assert (
            "already running (process" in run(project, "python", "-m", "flows.services", check=False, **settings).stdout
        )
    finally:
        assert serve("down") == "stopped\n"
    for address in addresses:
        with pytest.raises(OSError):
            urllib.request.urlopen(address, timeout=2)
    # A lock file of a process that was killed does not count.
    assert (project / ".tav" / "serve.lock").exists() and serve("down") == "not running\n"


@pytest.mark.long
@pytest.mark.timeout(600)
def test_what_ends_again_and_again_is_given_up(project: Path, tmp_path: Path) -> None:
    ports = {"PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api", "TAV_MLFLOW_PORT": str(free_port())}
    settings = ports | {"PREFECT_HOME": str(tmp_path / "prefect")}
    run(project, "python", "-m", "flows.services", "up", **settings)
    killed: set[int] = set()
    log = project / "logs/serve.log"
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
    assert len(killed) == log.read_text().count("is started again") + 1 == 4
    assert "prefect-worker has ended (signal 9) and is started again" in log.read_text()
    while run(project, "python", "-m", "flows.services", "down", **settings).stdout != "not running\n":
        assert time.monotonic() < end
