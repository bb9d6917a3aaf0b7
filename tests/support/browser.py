"""A real browser for tests of pages: Chromium, controlled through chromedriver over plain HTTP (W3C WebDriver)."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.servers import free_port

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--mute-audio",
)
SECONDS = 60


class Browser:
    """A browser window, opened by `browser_window`."""

    def __init__(self, port: int, path: str = "") -> None:
        self.port, self.path = port, path

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Send a WebDriver command, and return its value."""
        content = None if method == "GET" else json.dumps(body or {})
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        with contextlib.closing(connection):
            headers = {"Content-Type": "application/json"}
            connection.request(method, f"{self.path}/{path}".rstrip("/"), content, headers)
            response = connection.getresponse()
            value = json.load(response)["value"]
        assert response.status == 200, f"{method} {path}: {value['message']}"
        return value

    def open(self, page: Path) -> None:
        self.call("POST", "url", {"url": page.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """Run the body of a JavaScript function, and return its result."""
        return self.call("POST", "execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, condition: str, seconds: float = 30) -> Any:
        """Evaluate an expression until it is true, and return its value."""
        end = time.monotonic() + seconds
        while not (value := self.run(f"return {condition}")):
            assert time.monotonic() < end, f"not within {seconds} s: {condition}"
            time.sleep(0.05)
        return value

    def press(self, *keys: str) -> None:
        """Press and release keys, one after the other, in the focused element."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("POST", "actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def click(self, selector: str) -> None:
        self.run("document.querySelector(arguments[0]).click()", selector)

    def move_to(self, selector: str, x: int = 0, y: int = 0) -> None:
        """Move the mouse pointer to an element, `x` and `y` pixels from its centre."""
        self.run(
            "document.querySelector(arguments[0]).scrollIntoView({block: 'center', behavior: 'instant'})", selector
        )
        element = self.call("POST", "element", {"using": "css selector", "value": selector})
        move = {"type": "pointerMove", "duration": 0, "origin": element, "x": x, "y": y}
        self.call("POST", "actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move]}]})

    def resize(self, width: int, height: int) -> None:
        """Set the size of the page (a window itself has a minimum width)."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", metrics)

    def emulate(self, **features: str) -> None:
        """Set media features, such as `prefers_color_scheme="dark"`."""
        pairs = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.devtools("Emulation.setEmulatedMedia", {"features": pairs})

    def devtools(self, command: str, parameters: dict[str, Any]) -> Any:
        return self.call("POST", "goog/cdp/execute", {"cmd": command, "params": parameters})

    def messages(self) -> list[str]:
        """Return the console's warnings and errors since the last call."""
        entries = self.call("POST", "se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("WARNING", "SEVERE")]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("GET", "screenshot")))


@contextlib.contextmanager
def browser_window() -> Iterator[Browser]:
    """Open a headless Chromium with a new profile; skip the test if Chromium is not installed."""
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium with chromedriver on PATH (Debian: apt-get install chromium-driver)")
    port = free_port()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            server = Browser(port)
            _wait_until_ready(server)
            options = {"binary": chromium, "args": [*FLAGS, f"--user-data-dir={profile}"]}
            capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            session = server.call("POST", "session", {"capabilities": {"alwaysMatch": capabilities}})["sessionId"]
            window = Browser(port, f"/session/{session}")
            try:
                yield window
            finally:
                window.call("DELETE", "")
        finally:
            os.killpg(process.pid, signal.SIGTERM)  # Includes the browser, if it is still running.
            process.wait(SECONDS)


def _wait_until_ready(server: Browser) -> None:
    end = time.monotonic() + SECONDS
    while True:
        try:
            if server.call("GET", "status")["ready"]:
                return
        except OSError:
            pass
        assert time.monotonic() < end, "chromedriver does not answer"
        time.sleep(0.1)
