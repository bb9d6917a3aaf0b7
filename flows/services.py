"""`python -m flows.services`: a Prefect server, the deployment `tav/edit-batch`, a worker for it and the MLflow UI.

All of them listen on 127.0.0.1 and end with this command. `python -m flows.services up` starts it in the background, and
`python -m flows.services down` ends it. Ports: that of Prefect's `api.url` (prefect.toml, or PREFECT_API_URL in the
environment), and TAV_MLFLOW_PORT (5000).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tav.runtime.locks import Locked, file_lock, lock_holder
from tav_model.errors import TavError

POOL = "tav"
START_SECONDS = 120
STOP_SECONDS = 15
# A process that ends is started again; one that ends so many times within such a time has a lasting reason.
RESTARTS, RESTARTS_SECONDS = 3, 300


@dataclass(frozen=True)
class Services:
    """The process that holds the services, and where a browser finds them; "" for MLflow: nothing is tracked."""

    process: int
    prefect: str
    mlflow: str


def serve(root: Path) -> None:
    """Start everything, print the addresses, and wait for an interrupt. A process that ends is started again.

    Raises:
        TavError: it runs already, a port is taken, something does not start, or ends again and again; whatever was
            started is ended.
    """
    from prefect.settings import PREFECT_API_URL

    from tav.config import load_params
    from tav.runtime.redaction import redact
    from tav.tracking.store import resolve_uri

    api = urlsplit(PREFECT_API_URL.value() or "")
    if api.hostname not in ("127.0.0.1", "localhost") or api.port is None:
        raise TavError(
            f"prefect.toml: api.url: {api.geturl()!r} must be http://127.0.0.1:PORT/api to be served from here"
        )
    mlflow_port = mlflow_port_setting()
    uri = load_params(root / "params.yaml").tracking.uri
    if uri is not None:
        uri = resolve_uri(uri, root)
    logs = root / "logs"
    logs.mkdir(exist_ok=True)
    python = [sys.executable, "-m"]
    own_mlflow = uri is not None and not uri.startswith("http")
    mlflow = f"http://127.0.0.1:{mlflow_port}" if own_mlflow else redact(uri or "")
    environment = os.environ | {"TAV_MLFLOW_URL": mlflow}  # for the links on Prefect's pages

    with ExitStack() as stack:
        stack.enter_context(_only_one(root, f"http://127.0.0.1:{api.port}", mlflow))
        _check_free(api.port, "prefect.toml: api.url")
        if own_mlflow:
            _check_free(mlflow_port, "TAV_MLFLOW_PORT")
        children: dict[str, subprocess.Popen] = {}
        commands: dict[str, tuple[str, ...]] = {}

        def start(name: str, *command: str) -> None:
            with (logs / f"{name}.log").open("a") as log:
                child = subprocess.Popen(
                    [*python, *command], cwd=root, stdout=log, stderr=log, start_new_session=True, env=environment
                )
            stack.callback(stop, child)
            children[name], commands[name] = child, command

        start("prefect-server", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(api.port))
        if uri is not None and own_mlflow:
            # The address may hold a password, and everyone on the machine sees the arguments of processes.
            environment["MLFLOW_BACKEND_STORE_URI"] = uri
            # Nothing here is a job of the server's, for which it would start eight processes more.
            environment.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
            address = ("--host", "127.0.0.1", "--port", str(mlflow_port))
            start("mlflow-server", "mlflow", "server", *address, "--workers", "1")
        _wait(f"{api.geturl()}/health", children, "prefect-server")
        _prefect(root, "work-pool", "create", POOL, "--type", "process", "--overwrite")
        start("prefect-worker", "prefect", "worker", "start", "--pool", POOL)
        _prefect(root, "--no-prompt", "deploy", "--all")
        if "mlflow-server" in children:
            _wait(f"http://127.0.0.1:{mlflow_port}/health", children, "mlflow-server")
        print(f"Prefect   http://127.0.0.1:{api.port}")
        print(f"MLflow    {mlflow or 'none: tracking.uri is null in params.yaml'}")
        print(
            "ready: prefect deployment run tav/edit-batch --watch      (tav down ends everything)",
            flush=True,
        )
        ends: dict[str, list[float]] = {name: [] for name in children}
        while True:
            for name, child in list(children.items()):
                if child.poll() is None:
                    continue
                now = time.monotonic()
                ends[name] = [end for end in ends[name] if end > now - RESTARTS_SECONDS] + [now]
                if len(ends[name]) > RESTARTS:
                    raise TavError(f"{name} ends again and again; logs/{name}.log says why")
                print(f"{datetime.now():%H:%M:%S} {name} has ended ({_how(child)}) and is started again", flush=True)
                if name != "prefect-worker":  # whose flow runs go on
                    stop(child)  # what it has started itself, and left, which may have its port
                start(name, *commands[name])
            time.sleep(1)


def up(root: Path) -> None:
    """`serve` in the background; returns when it is ready, having printed what it says.

    Raises:
        TavError: it runs already, or what it says when it does not start.
    """
    if services := running(root):
        raise _already(services)
    log = root / "logs" / "serve.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as output:
        command = [sys.executable, "-m", "flows.services"]
        process = subprocess.Popen(command, cwd=root, stdout=output, stderr=output, start_new_session=True)
    try:
        while "ready:" not in log.read_text():
            if process.poll() is not None:
                raise TavError(log.read_text().strip().removeprefix("error: "))
            time.sleep(0.3)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    print(log.read_text(), end="")


def down(root: Path) -> None:
    """End what `up` or `serve` of this project has started, and nothing else.

    Raises:
        TavError: it does not end.
    """
    services = running(root)
    if services is None:
        print("not running")
        return
    os.kill(services.process, signal.SIGTERM)
    deadline = time.monotonic() + 6 * STOP_SECONDS
    while running(root):
        if time.monotonic() > deadline:
            raise TavError(f"process {services.process} does not end; logs/serve.log may say why")
        time.sleep(0.2)
    print("stopped")


@contextlib.contextmanager
def _only_one(root: Path, prefect: str, mlflow: str) -> Iterator[None]:
    """Hold the project's lock, which ends with the process, however that ends; the file says who and where."""
    try:
        with file_lock(_lock_path(root), prefect=prefect, mlflow=mlflow):
            yield
    except Locked as error:
        raise _already(_services(error.holder)) from None


def running(root: Path) -> Services | None:
    """What `serve` of this project has started and not ended, by the lock that it holds."""
    holder = lock_holder(_lock_path(root))
    return None if holder is None else _services(holder)


def _services(holder: dict[str, Any]) -> Services:
    return Services(holder.get("process", 0), holder.get("prefect", ""), holder.get("mlflow", ""))


def _already(services: Services) -> TavError:
    return TavError(f"already running (process {services.process}); make down or tav down ends it")


def _lock_path(root: Path) -> Path:
    return root / ".tav" / "serve.lock"


def api_url(root: Path) -> str:
    """The address of Prefect's API by the environment or prefect.toml, without the seconds that Prefect's import takes.

    Raises:
        TavError: neither says one.
    """
    if url := os.environ.get("PREFECT_API_URL"):
        return url.rstrip("/")
    try:
        url = tomllib.loads((root / "prefect.toml").read_text(encoding="utf-8"))["api"]["url"]
    except (OSError, ValueError, KeyError, TypeError):
        raise TavError('prefect.toml: no api.url; it should be "http://127.0.0.1:4200/api"') from None
    return str(url).rstrip("/")


def mlflow_port_setting() -> int:
    text = os.environ.get("TAV_MLFLOW_PORT", "5000")
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise TavError(f"TAV_MLFLOW_PORT: {text!r} must be a port, 1 to 65535")
    return int(text)


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def answers(url: str, seconds: float = 5) -> bool:
    """Whether an HTTP server answers there without an error."""
    try:
        with urllib.request.urlopen(url, timeout=seconds):
            return True
    except (OSError, ValueError, HTTPException):
        return False


def _check_free(port: int, setting: str) -> None:
    if not is_free(port):
        raise TavError(f"port {port} is taken; end what uses it, or choose another one ({setting})")


def _prefect(root: Path, *command: str) -> None:
    done = subprocess.run([sys.executable, "-m", "prefect", *command], cwd=root, capture_output=True, text=True)
    if done.returncode:
        (root / "logs" / "deploy.log").write_text(done.stdout + done.stderr)
        raise TavError(f"prefect {' '.join(command)} failed; logs/deploy.log says why")


def _wait(url: str, children: dict[str, subprocess.Popen], name: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if children[name].poll() is not None:
            break
        if answers(url):
            return
        time.sleep(0.3)
    raise TavError(f"{name} does not answer; logs/{name}.log says why")


def _how(child: subprocess.Popen) -> str:
    return f"signal {-child.returncode}" if child.returncode < 0 else f"status {child.returncode}"


def stop(child: subprocess.Popen) -> None:
    """End a process with all that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
            child.wait(STOP_SECONDS)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.services", description=__doc__.partition("\n")[0])
    parser.add_argument("command", nargs="?", choices=("up", "down"), help="up: in the background; down: end it")
    command = {"up": up, "down": down, None: serve}[parser.parse_args(arguments).command]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        command(Path.cwd())
    except TavError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
