"""Find the recorded version of an output in DVC's cache, whether or not the output itself still exists."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from tav.versioning.lock_file import read_lock_file, recorded_hashes


def previous_output(root: Path, path: str) -> Mapping[str, Path]:
    """Return the files of an output folder as dvc.lock records it, by name relative to the folder.

    DVC deletes the outputs of a stage before it runs the stage, and a fresh clone has none before they are checked out.

    Args:
        root: the project's folder.
        path: the output folder as dvc.yaml names it, relative to `root`.

    Returns:
        Paths inside DVC's local cache, which must only be read: the cache is shared by all versions. Empty if there is
        no dvc.lock, if it does not record the folder, or if the cache does not have it.
    """
    recorded = _recorded_hash(root, path)
    if recorded is None or not recorded.endswith(".dir"):
        return {}
    cache = _cache_folder(root) / "files" / "md5"
    try:
        entries = json.loads((cache / recorded[:2] / recorded[2:]).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    files = {entry["relpath"]: cache / entry["md5"][:2] / entry["md5"][2:] for entry in entries}
    return {name: file for name, file in files.items() if file.is_file()}


def _recorded_hash(root: Path, path: str) -> str | None:
    for stage in read_lock_file(root).values():
        hashes = recorded_hashes(stage, "outs")
        if path in hashes:
            return hashes[path]
    return None


def _cache_folder(root: Path) -> Path:
    """Return DVC's local cache. DVC is imported only if a configuration file has a section `cache`."""
    import platformdirs

    folders = [
        root / ".dvc",
        Path(os.environ.get("DVC_GLOBAL_CONFIG_DIR") or platformdirs.user_config_dir("dvc", "iterative")),
        Path(os.environ.get("DVC_SYSTEM_CONFIG_DIR") or platformdirs.site_config_dir("dvc", "iterative")),
    ]
    for file in (folder / name for folder in folders for name in ("config", "config.local")):
        if file.is_file() and re.search(r"^\s*\[\s*cache\s*\]", file.read_text(encoding="utf-8"), re.MULTILINE):
            from tav.versioning.dvc_internals import configured_cache_folder

            return configured_cache_folder(root)
    return root / ".dvc" / "cache"
