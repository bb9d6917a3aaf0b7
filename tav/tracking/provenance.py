"""Where a run comes from: git revision, user, command and version."""

from __future__ import annotations

import contextlib
import functools
import getpass
import importlib.metadata
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Revision:
    """The git revision of a project.

    Attributes:
        commit: its hash.
        is_dirty: whether tracked files have changes that are not committed; those that runs change do not count.
    """

    commit: str
    is_dirty: bool


def environment_tags(root: Path) -> dict[str, str]:
    """Return tags that name the git revision, user, command and version."""
    program = Path(sys.argv[0])
    name = f"python -m {program.parent.name}" if program.name == "__main__.py" else program.name
    tags = {"mlflow.source.name": " ".join([name, *sys.argv[1:2]]), "mlflow.source.type": "LOCAL"}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        tags["tav.version"] = importlib.metadata.version("tav")
    with contextlib.suppress(KeyError, OSError):  # A container's user may have no name.
        tags["mlflow.user"] = getpass.getuser()
    if revision := git_revision(root.resolve()):
        tags["mlflow.source.git.commit"] = revision.commit
        tags["tav.git.dirty"] = str(revision.is_dirty)
    return tags


@functools.cache
def git_revision(root: Path) -> Revision | None:
    """Return the revision of the project in `root`, as it was at the process's first call; None without a commit.

    One call for each process is enough, and right: its code was loaded from that revision.
    """
    command = ["git", "--no-optional-locks", "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    changed_by_runs = (":!dvc.lock", ":!metrics/dvc.yaml")
    try:
        status = subprocess.run(
            [*command, "--", ".", *changed_by_runs],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    commit = re.search(r"^# branch\.oid ([0-9a-f]{40,})$", status, re.MULTILINE)
    if commit is None:
        return None
    return Revision(commit[1], any(not line.startswith("#") for line in status.splitlines()))
