"""Files that are either whole or absent: atomic writes, tensors with metadata, digests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tav_model.errors import TavError

if TYPE_CHECKING:
    import torch


LARGEST_JSON = 256 * 2**20


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_mode(mode: int) -> int:
    """``mode`` less the user's umask; tempfile makes everything private, which shared projects do not expect."""
    umask = os.umask(0)
    os.umask(umask)
    return mode & ~umask


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it takes the final name, on failure it goes.

    The temporary name keeps the suffix, because video writers choose the container by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".tmp-", suffix=path.suffix)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(_open_mode(0o666))
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path``; on success it replaces ``path`` whole.

    A folder cannot be renamed over another, so for a moment ``path`` is absent; it is never half-written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".tmp-{path.name}-"))
    try:
        yield temporary
        temporary.chmod(_open_mode(0o777))
        for child in temporary.rglob("*"):
            if child.is_file():
                _sync(child)
        if path.exists():
            aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".tmp-{path.name}-"))
            os.replace(path, aside)
            os.replace(temporary, path)
            shutil.rmtree(aside)
        else:
            os.replace(temporary, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_text(path: str | Path, most: int) -> str:
    """The text of a UTF-8 file of at most `most` bytes (a byte-order mark stays).

    Raises:
        TavError: something else than a file, such as a pipe, which may have no end; or a larger one.
        OSError, UnicodeDecodeError: as Python's own.
    """
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise TavError(f"{path}: is not a file")
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise TavError(f"{path}: too large; at most {most // 2**20} MiB are allowed")
    return content.decode("utf-8")


def read_json(path: str | Path) -> Any:
    """What a JSON file holds.

    Raises:
        TavError: missing, damaged, too large, or nested too deeply.
    """
    try:
        return json.loads(read_text(path, LARGEST_JSON))
    except FileNotFoundError:
        raise TavError(f"{path}: no such file") from None
    except OSError as error:
        raise TavError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # A number of thousands of digits is no JSONDecodeError.
        raise TavError(f"{path}: not a JSON file ({error})") from None


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write ``tensors`` as safetensors. ``metadata`` says what they are (stage, shape order, scale, fps, inputs).

    The same tensors and metadata give the same bytes.
    """
    from safetensors.torch import save_file

    with atomic_file(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, dict(metadata))
        _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in order: the library writes it in that of a random hash."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(ordered) > length:
            raise ValueError(f"{path}: the header does not fit its place")
        file.seek(8)
        file.write(ordered.ljust(length))


def load_tensors(path: str | Path, device: str = "cpu") -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read what `save_tensors` wrote: the tensors by name, and the metadata.

    Raises:
        TavError: the file is missing, truncated or not safetensors.
    """
    with _open_tensors(path, device) as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})


def check_tensors(path: str | Path) -> None:
    """Look at the header of a safetensors file alone. Raises TavError as `load_tensors`."""
    with _open_tensors(path, "cpu"):
        pass


@contextlib.contextmanager
def _open_tensors(path: str | Path, device: str) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    if not os.path.exists(path):
        raise TavError(f"{path}: no such file")
    if not os.path.isfile(path):
        raise TavError(f"{path}: is not a file")
    try:
        with safe_open(str(path), framework="pt", device=device) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise TavError(f"{path}: not a whole safetensors file ({error})") from None


def digest(*parts: str | bytes | Path) -> str:
    """A short SHA-256 over texts and over the contents of files and folders, in the order given."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            files = sorted(p for p in part.rglob("*") if p.is_file()) if part.is_dir() else [part]
            for file in files:
                name = file.relative_to(part).as_posix() if part.is_dir() else ""
                with file.open("rb") as stream:
                    content = hashlib.file_digest(stream, "sha256").digest()
                sha.update(f"file:{len(name)}:{name}".encode() + content)
        else:
            data = part.encode() if isinstance(part, str) else part
            sha.update(f"text:{len(data)}:".encode() + data)
    return sha.hexdigest()[:32]
