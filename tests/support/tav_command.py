"""The command `tav` on a small project: in this process or one of its own, and what it leaves in the project."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tests.support.dvc_project import environment as dvc_environment
from tests.support.projects import ROOT, environment
from tests.support.servers import free_port

COMMANDS = ("add", "run", "edit", "base", "status", "report", "compare", "benchmark", "up", "down", "doctor")


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a command that was refused."""
        assert self.out == "" and self.err.count("\n") == 1 and self.err.startswith("error: "), self
        return self.err


Tav = Callable[..., Ended]


def start_tav(project: Path, home: Path, *arguments: str, **pipes: Any) -> subprocess.Popen:
    """Start `tav` in a process and session of its own, for a user at `home`, at an address where no Prefect runs."""
    settings = {
        "HOME": str(home),
        "PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api",
        "TAV_MLFLOW_PORT": str(free_port()),
    }
    isolated = {name: value for name, value in dvc_environment(home).items() if name != "PATH"}
    return subprocess.Popen(
        [sys.executable, "-m", "tav_cli.main", *arguments],
        cwd=project,
        env=environment(**isolated, **settings, PYTHONPATH=str(ROOT)),
        text=True,
        start_new_session=True,
        **pipes,
    )


def contents(root: Path) -> dict[str, bytes]:
    """All files of a project but those of git, DVC and our own work folder."""
    parts = {".git", ".dvc", ".tav", "logs", "__pycache__"}
    files = (path for path in root.rglob("*") if path.is_file() and not parts & set(path.relative_to(root).parts))
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def change(path: Path, old: str, new: str) -> None:
    """Replace one occurrence of a text that must be there."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def read_yaml(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())
