"""What DVC's cache holds of an output's recorded version, whatever has become of the output itself."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path


def previous_output(root: Path, path: str) -> Mapping[str, Path]:
    """The files of an output folder as dvc.lock records it, by name relative to the folder.

    DVC deletes the outputs of a stage before it runs it, and a fresh clone has none before they are checked out.

    Args:
        root: the project's folder.
        path: the output folder as dvc.yaml names it, relative to `root`.

    Returns:
        Paths inside DVC's local cache, which must be read only: the cache is shared by all versions. Empty when there
        is nothing: no dvc.lock, no such folder in it, or not in the cache.
    """
    recorded = _recorded_hash(root / "dvc.lock", path)
    if recorded is None or not recorded.endswith(".dir"):
        return {}
    cache = _cache_folder(root) / "files" / "md5"
    try:
        entries = json.loads((cache / recorded[:2] / recorded[2:]).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    files = {entry["relpath"]: cache / entry["md5"][:2] / entry["md5"][2:] for entry in entries}
    return {name: file for name, file in files.items() if file.is_file()}


def _recorded_hash(lock_file: Path, path: str) -> str | None:
    import yaml

    try:
        # The pure Python loader takes ten times as long.
        content = yaml.load(lock_file.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        for stage in content["stages"].values():
            for output in stage.get("outs", []):
                if output["path"] == path and output.get("hash") == "md5":
                    return output["md5"]
    except (OSError, yaml.YAMLError, LookupError, TypeError, AttributeError):
        return None  # No lock file, or one that DVC itself will complain of.
    return None


def _cache_folder(root: Path) -> Path:
    """Where `dvc config cache.dir` says; DVC is asked only if some configuration file says anything of a cache."""
    import platformdirs

    folders = [
        root / ".dvc",
        Path(os.environ.get("DVC_GLOBAL_CONFIG_DIR") or platformdirs.user_config_dir("dvc", "iterative")),
        Path(os.environ.get("DVC_SYSTEM_CONFIG_DIR") or platformdirs.site_config_dir("dvc", "iterative")),
    ]
    for file in (folder / name for folder in folders for name in ("config", "config.local")):
        if file.is_file() and re.search(r"^\s*\[\s*cache\s*\]", file.read_text(encoding="utf-8"), re.MULTILINE):
            from dvc.config import Config

            folder = Config(str(root / ".dvc"))["cache"].get("dir")
            return Path(folder) if folder else root / ".dvc" / "cache"
    return root / ".dvc" / "cache"
