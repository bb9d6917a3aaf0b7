"""The local services: a Prefect server, the deployment `tav/edit-batch`, a worker for it and the MLflow UI.

`python -m flows.services` runs them in the foreground and restarts what ends; they stop with it. `tav up` starts that
command in the background, and `tav down` stops it. All of them listen on 127.0.0.1 only. Ports: that of Prefect's `api.url`
(prefect.toml, or PREFECT_API_URL in the environment), and TAV_MLFLOW_PORT (5000).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from http.client import HTTPException
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote, urlsplit

from flows.project_database import project_database
from tav.runtime.exit_status import ExitStatus
from tav.runtime.locks import Locked, file_lock, lock_holder
from tav_model.errors import TavError

POOL, DEPLOYMENT = "tav", "tav/edit-batch"
START_SECONDS = 120
STOP_SECONDS = 15
# A process that ends is restarted, at most so many times within so many seconds.
MAX_RESTARTS, RESTARTS_SECONDS = 3, 300
READY = "ready: "


@dataclass(frozen=True)
class Services:
    """The services of a project that run now.

    Attributes:
        process: the id of the process that holds them, `python -m flows.services`.
        prefect: the address of Prefect's pages.
        mlflow: the address of MLflow's pages; empty where nothing is tracked.
    """

    process: int
    prefect: str
    mlflow: str


# In the background, for `tav up`, `tav down` and `tav status`


def start(root: Path) -> Services:
    """Run `serve` in the background, detached from the terminal; return when everything is ready.

    Raises:
        TavError: the services run already, or do not start.
    """
    if services := running(root):
        raise _already_running(services)
    log = root / "logs" / "services.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as output:
        process = _start_detached([sys.executable, "-m", "flows.services"], root, output.fileno())
    try:
        while not any(line.startswith(READY) for line in log.read_text().splitlines()):
            if process.poll() is not None:
                raise TavError(_start_failure(log))
            time.sleep(0.3)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    services = running(root)
    if services is None:
        raise TavError(_start_failure(log))
    return services


def stop(root: Path) -> bool:
    """Stop the services of this project; False: there were none.

    Raises:
        TavError: they do not stop.
    """
    services = running(root)
    if services is None:
        return False
    os.kill(services.process, signal.SIGTERM)
    deadline = time.monotonic() + 6 * STOP_SECONDS
    while running(root):
        if time.monotonic() > deadline:
            raise TavError(f"process {services.process} does not stop; see logs/services.log")
        time.sleep(0.2)
    return True


def running(root: Path) -> Services | None:
    """Return the services of this project, by the lock that their process holds; None: they do not run."""
    holder = lock_holder(_lock_path(root))
    return None if holder is None else _services(holder)


def _start_failure(log: Path) -> str:
    """Return the error of a `serve` that has ended, as the last of its log."""
    errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    return errors[-1].removeprefix("error: ") if errors else "the services do not start; see logs/services.log"


# In the foreground


def serve(root: Path) -> None:
    """Start everything, log the addresses on standard output, and restart what ends, until an interrupt.

    Raises:
        TavError: the services run already, a port is taken, something does not start, or ends again and again; whatever
            was started is stopped.
    """
    from prefect.settings import PREFECT_API_URL

    from tav.config import load_params
    from tav.runtime.redaction import redact
    from tav.tracking.store import resolve_uri

    api = urlsplit(PREFECT_API_URL.value() or "")
    if api.hostname not in ("127.0.0.1", "localhost") or api.port is None:
        raise TavError(f"prefect.toml: api.url: {api.geturl()!r} must be http://127.0.0.1:PORT/api to be served here")
    mlflow_port = mlflow_port_setting()
    tracking = load_params(root / "params.yaml").tracking
    uri = tracking.uri
    if uri is not None:
        uri = resolve_uri(uri, root)
    serves_mlflow = uri is not None and not uri.startswith("http")
    mlflow = f"http://127.0.0.1:{mlflow_port}" if serves_mlflow else redact(uri or "")
    prefect = f"http://127.0.0.1:{api.port}"
    environment = os.environ | project_database(root) | {"TAV_MLFLOW_URL": mlflow}  # for the links on Prefect's pages
    # Without these two, `prefect deployment run --watch` shows the states of a run, but not its log.
    environment.setdefault("PREFECT_SERVER_LOGS_STREAM_OUT_ENABLED", "true")
    environment.setdefault("PREFECT_SERVER_LOGS_STREAM_PUBLISHING_ENABLED", "true")

    with _only_one(root, prefect, mlflow), _Supervisor(root, environment) as supervisor:
        _check_free(api.port, "prefect.toml: api.url", api.geturl())
        if serves_mlflow:
            _check_free(mlflow_port, "TAV_MLFLOW_PORT")
        supervisor.start("prefect-server", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(api.port))
        if uri is not None and serves_mlflow:
            _create_experiment(uri, tracking.experiment, root)
            # The address may hold a password, and everyone on the machine sees the arguments of processes.
            environment["MLFLOW_BACKEND_STORE_URI"] = uri
            # The server's job runner, which nothing here uses, would start eight more processes.
            environment.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
            address = ("--host", "127.0.0.1", "--port", str(mlflow_port))
            supervisor.start("mlflow-server", "mlflow", "server", *address, "--workers", "1")
        supervisor.wait_for("prefect-server", f"{api.geturl()}/health")
        _run_prefect(root, "work-pool", "create", POOL, "--type", "process", "--overwrite")
        supervisor.start("prefect-worker", "prefect", "worker", "start", "--pool", POOL)
        _run_prefect(root, "--no-prompt", "deploy", "--all")
        if serves_mlflow:
            supervisor.wait_for("mlflow-server", f"http://127.0.0.1:{mlflow_port}/health")
        _log(f"{READY}Prefect {prefect}, MLflow {mlflow or 'none'}")
        supervisor.watch()


class _Supervisor:
    """The processes of the services: start them, restart those that end, stop all of them on exit.

    The output of each is in `logs/NAME.log`.
    """

    def __init__(self, root: Path, environment: dict[str, str]) -> None:
        self.root, self.environment = root, environment
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._commands: dict[str, tuple[str, ...]] = {}
        self._ends: dict[str, list[float]] = {}
        self._exit_stack = contextlib.ExitStack()

    def __enter__(self) -> _Supervisor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._exit_stack.close()

    def start(self, name: str, *command: str) -> None:
        """Start `python -m COMMAND`."""
        path = self.root / "logs" / f"{name}.log"
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as log:
            process = _start_detached([sys.executable, "-m", *command], self.root, log.fileno(), self.environment)
        self._exit_stack.callback(stop_process_group, process)
        self.processes[name], self._commands[name] = process, command

    def wait_for(self, name: str, url: str) -> None:
        """Wait until a process answers.

        Raises:
            TavError: it ends, or does not answer within START_SECONDS.
        """
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.processes[name].poll() is not None:
                break
            if answers(url):
                return
            time.sleep(0.3)
        raise TavError(f"{name} does not answer; see logs/{name}.log")

    def watch(self) -> None:
        """Restart processes that end, for ever.

        Raises:
            TavError: one has ended more than MAX_RESTARTS times within RESTARTS_SECONDS.
        """
        while True:
            for name, process in list(self.processes.items()):
                if process.poll() is not None:
                    self._restart(name, process)
            time.sleep(1)

    def _restart(self, name: str, process: subprocess.Popen[bytes]) -> None:
        now = time.monotonic()
        recent = [end for end in self._ends.get(name, []) if end > now - RESTARTS_SECONDS]
        self._ends[name] = [*recent, now]
        if len(self._ends[name]) > MAX_RESTARTS:
            raise TavError(f"{name} ends again and again; see logs/{name}.log")
        code = process.returncode
        reason = f"signal {-code}" if code < 0 else f"exit code {code}"
        _log(f"{datetime.now():%H:%M:%S} {name} ended ({reason}), restarting it")
        if name != "prefect-worker":  # whose flow runs continue
            stop_process_group(process)  # what it started and left behind may have its port
        self.start(name, *self._commands[name])


def _start_detached(
    command: list[str], root: Path, output: int, environment: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own that holds nothing of the user's terminal.

    A program that waits until its terminal is closed, such as `script` or a CI runner, would else wait for the services.
    """
    return subprocess.Popen(
        command,
        cwd=root,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
        env=environment,
    )


def stop_process_group(process: subprocess.Popen[bytes]) -> None:
    """Stop a process that leads a group, with everything it has started: SIGTERM, and SIGKILL after STOP_SECONDS."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(STOP_SECONDS)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


@contextlib.contextmanager
def _only_one(root: Path, prefect: str, mlflow: str) -> Iterator[None]:
    """Hold the project's lock, whose file has the process id and the addresses; it is released when the process ends."""
    try:
        with file_lock(_lock_path(root), prefect=prefect, mlflow=mlflow):
            yield
    except Locked as error:
        raise _already_running(_services(error.holder)) from None


def _services(holder: Mapping[str, Any]) -> Services:
    return Services(holder.get("process", 0), holder.get("prefect", ""), holder.get("mlflow", ""))


def _already_running(services: Services) -> TavError:
    return TavError(f"the services are already running (process {services.process}); tav down stops them")


def _lock_path(root: Path) -> Path:
    return root / ".tav" / "services.lock"


def _create_experiment(uri: str, experiment: str, root: Path) -> None:
    """Create the experiment, so that its page can be opened before the first run; the server reports a broken store."""
    from tav.tracking.store import Store

    with contextlib.suppress(Exception):
        Store(uri, experiment, root).connect()


def _run_prefect(root: Path, *command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", *command],
        cwd=root,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        (root / "logs" / "deploy.log").write_text(done.stdout + done.stderr)
        raise TavError(f"prefect {' '.join(command)} failed; see logs/deploy.log")


def _log(message: str) -> None:
    print(message, flush=True)


# Addresses and ports


def api_url(root: Path) -> str:
    """Return the address of Prefect's API, from the environment or prefect.toml, without importing Prefect.

    Raises:
        TavError: neither has one.
    """
    if url := os.environ.get("PREFECT_API_URL"):
        return url.rstrip("/")
    try:
        url = tomllib.loads((root / "prefect.toml").read_text(encoding="utf-8"))["api"]["url"]
    except (OSError, ValueError, KeyError, TypeError):
        raise TavError('prefect.toml: no api.url; it should be "http://127.0.0.1:4200/api"') from None
    return str(url).rstrip("/")


def mlflow_page(root: Path, address: str) -> str:
    """Return the page of the project's MLflow experiment: its list of runs.

    Args:
        root: the project's folder, whose params.yaml names the experiment.
        address: of an MLflow server; returned as it is where the server does not know the experiment.
    """
    from tav.config import load_params
    from tav.tracking.pages import experiment_page

    name = quote(load_params(root / "params.yaml").tracking.experiment)
    experiment = _fetch(f"{address}/api/2.0/mlflow/experiments/get-by-name?experiment_name={name}")
    try:
        return experiment_page(address, experiment["experiment"]["experiment_id"])
    except (KeyError, TypeError):
        return address


def mlflow_port_setting() -> int:
    """Return the port of the MLflow UI, from TAV_MLFLOW_PORT.

    Raises:
        TavError: it is not a port.
    """
    text = os.environ.get("TAV_MLFLOW_PORT", "5000")
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise TavError(f"TAV_MLFLOW_PORT: {text!r} must be a port, 1 to 65535")
    return int(text)


def is_free(port: int) -> bool:
    """Return whether a server on 127.0.0.1 could listen on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def answers(url: str, seconds: float = 5) -> bool:
    """Return whether an HTTP server answers at the address without an error."""
    if not url.startswith(("http://", "https://")):
        return False
    try:
        with urllib.request.urlopen(url, timeout=seconds):  # noqa: S310 (the scheme is checked above)
            return True
    except (OSError, ValueError, HTTPException):
        return False


def served_project(api: str) -> Path | None:
    """Return the folder of the project that the Prefect server at this address runs `tav/edit-batch` in.

    None: there is no such server or deployment, or it is on another machine, where the folder is not ours.
    """
    if not api.startswith(("http://", "https://")):
        return None
    try:
        (step,) = _fetch(f"{api}/deployments/name/{DEPLOYMENT}", timeout=2)["pull_steps"]
        folder = Path(step["prefect.deployments.steps.set_working_directory"]["directory"])
    except (ValueError, KeyError, TypeError):
        return None
    return folder if folder.is_dir() else None


def _fetch(url: str, timeout: float = 5) -> Any:
    """Return the JSON at an address over HTTP; None where there is no answer, or another one."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as answer:  # noqa: S310 (the caller has checked the protocol)
            return json.load(answer)
    except (OSError, ValueError, HTTPException):
        return None


def serving_api(root: Path) -> str | None:
    """Return the address of the Prefect server that runs of this project report to; None: none is running.

    That is the project's own, or what answers at the configured address, but not the server of another project that
    happens to use the same port. An address in the environment variable PREFECT_API_URL is the user's choice.

    Raises:
        TavError: as `api_url`.
    """
    if services := running(root):
        return f"{services.prefect}/api"
    url = api_url(root)
    if not answers(f"{url}/health", 2):
        return None
    if "PREFECT_API_URL" not in os.environ and served_project(url) not in (None, root.resolve()):
        return None
    return url


def _check_free(port: int, setting: str, api: str = "") -> None:
    if not is_free(port):
        project = served_project(api)
        program = f"the services of {project}" if project else "the program that uses it"
        raise TavError(f"port {port} is taken; stop {program}, or choose another port ({setting})")


def main(arguments: list[str] | None = None) -> ExitStatus:
    """Run the services in the foreground; SIGTERM and Ctrl-C stop them."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.services",
        description="Run Prefect, its worker and the MLflow UI in the foreground. `tav up` runs them in the background.",
    )
    parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        serve(Path.cwd())
    except TavError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitStatus.USAGE
    except KeyboardInterrupt:
        _log("stopped")
    return ExitStatus.SUCCESS


if __name__ == "__main__":
    sys.exit(main())
