"""A Prefect server for one run, for when none is running. It ends with the process that started it, however that ends.

It keeps its runs in the project's database, so that the pages of the next `tav up` show them.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from flows.project_database import project_database
from flows.services import START_SECONDS, answers, stop_process_group

SET_PARENT_DEATH_SIGNAL = 1  # of Linux's prctl
GRACE_SECONDS = 2


def start_temporary_server(log: Path) -> str | None:
    """Start the server and return the address of its API when it answers; None: it does not start, see its log.

    Call it before Prefect is imported, so that the server ends after Prefect's client has sent its last messages.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as listening, log.open("a") as output:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
        # A session of its own: Ctrl-C is for the run, which then still has to report to the server that it was stopped.
        server = subprocess.Popen(
            [sys.executable, "-m", "flows.temporary_server", str(listening.fileno()), str(os.getpid())],
            pass_fds=[listening.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=os.environ | {"PREFECT_API_URL": url},
        )
    atexit.register(stop_process_group, server)
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        if answers(f"{url}/health"):
            return url
        time.sleep(0.1)
    return None


def main() -> None:
    """Serve on the socket that the parent process has opened."""
    descriptor, parent = map(int, sys.argv[1:])
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit()  # The parent ended before the signal was set up, and no signal will come.
    import uvicorn
    from prefect.context import refresh_global_settings_context

    os.environ |= project_database(Path.cwd())
    refresh_global_settings_context()
    from prefect.server.api.server import create_app

    app = create_app(ephemeral=True, final=True)
    config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=GRACE_SECONDS)
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=descriptor)])


if __name__ == "__main__":
    main()
