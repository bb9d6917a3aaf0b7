"""Where a run comes from: git revision, user, command, version, and the Prefect flow run."""

from __future__ import annotations

import contextlib
import getpass
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path


def environment_tags(root: Path) -> dict[str, str]:
    """Who runs what: git revision, user, command, version, and the Prefect flow run if there is one."""
    program = Path(sys.argv[0])
    name = f"python -m {program.parent.name}" if program.name == "__main__.py" else program.name
    tags = {"mlflow.source.name": " ".join([name, *sys.argv[1:2]]), "mlflow.source.type": "LOCAL"}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        tags["tav.version"] = importlib.metadata.version("tav")
    with contextlib.suppress(KeyError, OSError):  # A container's user may have no name.
        tags["mlflow.user"] = getpass.getuser()
    if flow_run := os.environ.get("PREFECT__FLOW_RUN_ID"):
        tags["prefect.flow_run_id"] = flow_run
    # dvc.lock says what a run left, and changes while it runs.
    command = ["git", "--no-optional-locks", "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        status = subprocess.run(
            [*command, "--", ".", ":!dvc.lock"], cwd=root, capture_output=True, text=True, timeout=10, check=True
        ).stdout
        revision = re.search(r"^# branch\.oid ([0-9a-f]{40,})$", status, re.MULTILINE)
        if revision is not None:
            tags["mlflow.source.git.commit"] = revision[1]
            tags["tav.git.dirty"] = str(any(not line.startswith("#") for line in status.splitlines()))
    return tags
