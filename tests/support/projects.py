"""Fresh copies of this project with a clip of their own, for tests that run the real commands in them."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
# Small enough for seconds on a CPU; everything else is as in the project's params.yaml.
QUICK = {
    "decode": {"frames": 4, "width": 64, "height": 64},
    "tune": {"steps": 4},
    "invert": {"steps": 3},
    "edit": {"steps": 3},
    "runtime": {"checkpoint_every": 2, "device": "cpu"},
}


def fresh_clone(folder: Path) -> Path:
    """Write the project's files as git tracks them, with uncommitted changes, into a git repository of their own."""
    return Path(shutil.copytree(_clone(), folder, symlinks=True, dirs_exist_ok=True))


@functools.cache
def _clone() -> Path:
    """Return the clone that every other one in this process is a copy of."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    temporary = tempfile.mkdtemp(prefix="tav-clone-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    folder = Path(temporary) / "project"
    folder.mkdir()
    for name in listed.stdout.decode().split("\0"):
        source = ROOT / name
        if name and not name.startswith("tests/") and source.is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)
    for command in (
        ["git", "init", "-q", "-b", "main"],
        ["git", "config", "user.name", "test"],
        ["git", "config", "user.email", "test@localhost"],
        ["git", "config", "core.checkStat", "minimal"],  # copies have other inodes, and the same contents
        ["git", "config", "core.trustctime", "false"],
        ["git", "add", "-A"],
        ["git", "commit", "-q", "-m", "fresh clone"],
    ):
        subprocess.run(command, cwd=folder, check=True)
    return folder


def change_params(project: Path, changes: Mapping[str, Any], clips: Mapping[str, Any] | None = None) -> None:
    """Set keys of sections in params.yaml; `clips`, where given, replaces all of them."""
    path = project / "params.yaml"
    params = yaml.safe_load(path.read_text())
    for section, values in changes.items():
        if isinstance(values, Mapping):
            params[section].update(values)
        else:
            params[section] = values
    if clips is not None:
        params["clips"] = dict(clips)
    path.write_text(yaml.safe_dump(params, sort_keys=False))


def environment(**extra: str) -> dict[str, str]:
    """The environment of a user who has activated the virtual environment these tests run in, offline."""
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_", "DVC_", "TAV_"))
    }
    return kept | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DVC_NO_ANALYTICS": "1",
        "HF_HUB_OFFLINE": "1",
        **extra,
    }


def run(
    project: Path, *command: str, check: bool = True, timeout: float = 300, **extra: str
) -> subprocess.CompletedProcess:
    """Run a command in the project; its output is text, standard error included."""
    done = subprocess.run(
        command,
        cwd=project,
        env=environment(**extra),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
    )
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout}")
    return done
