"""Read dvc.lock without importing DVC, which takes a second."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_lock_file(root: Path) -> Mapping[str, Any]:
    """Return the stages of the project's dvc.lock by name (`tune@ball`), each with `deps` and `outs`.

    Returns:
        An empty mapping if there is no dvc.lock, or a damaged one, which DVC itself reports.
    """
    import yaml

    try:
        from yaml import CSafeLoader as Loader  # ten times as fast
    except ImportError:
        from yaml import SafeLoader as Loader
    try:
        content = yaml.load((root / "dvc.lock").read_bytes(), Loader=Loader)
    except (OSError, yaml.YAMLError):
        return {}
    stages = content.get("stages") if isinstance(content, dict) else None
    return stages if isinstance(stages, dict) else {}


def recorded_hashes(stage: Mapping[str, Any], kind: str) -> dict[str, str]:
    """Return the MD5 that dvc.lock records for each of a stage's files and folders, by path.

    Args:
        stage: an entry of `read_lock_file`.
        kind: `deps` or `outs`.
    """
    try:
        return {str(entry["path"]): str(entry["md5"]) for entry in stage.get(kind, []) if entry.get("hash") == "md5"}
    except (LookupError, TypeError, AttributeError):
        return {}
