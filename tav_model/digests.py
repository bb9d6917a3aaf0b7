"""Digests of texts, files and folders, which identify inputs and settings."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def canonical_json(value: Any) -> str:
    """Return JSON that is the same text for equal values: sorted keys, no white space. For digests and identities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(*parts: str | bytes | Path) -> str:
    """Return a SHA-256, cut to 32 hexadecimal digits, of texts and of the contents of files and folders, in order."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            files = sorted(p for p in part.rglob("*") if p.is_file()) if part.is_dir() else [part]
            for file in files:
                name = file.relative_to(part).as_posix() if part.is_dir() else ""
                sha.update(f"file:{len(name)}:{name}".encode() + file_sha256(file).digest())
        else:
            data = part.encode() if isinstance(part, str) else part
            sha.update(f"text:{len(data)}:".encode() + data)
    return sha.hexdigest()[:32]


def file_sha256(path: Path) -> hashlib._Hash:
    """Return the SHA-256 object of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256")
