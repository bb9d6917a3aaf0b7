"""Files that are either whole or absent: atomic writes, tensors with metadata, digests."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tav_model.errors import FullDiskError, TavError

if TYPE_CHECKING:
    import torch

TEMPORARY = ".tmp-"  # What no one but its writer looks at begins so; git and DVC ignore it.
FULL = {
    errno.ENOSPC: "no room left on the disk{room}; make room",
    errno.EDQUOT: "the disk quota is used up{room}; make room",
    errno.EFBIG: "larger than a file may be here; raise that limit (ulimit -f)",
}


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
    """Yield a temporary path on the disk of ``path``; on success it takes the final name, on failure it goes.

    The temporary name keeps the suffix, because video writers choose the container by it.

    Raises:
        FullDiskError: in place of any error that says that the disk is full.
    """
    path = Path(path)
    with explained_full_disk(path), _workplace(path.parent) as folder:
        temporary = folder / path.name
        temporary.touch()
        with explained_full_disk(path):  # Inside too: what was written so far still takes its room.
            yield temporary
            temporary.chmod(_open_mode(0o666))
            _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder on the disk of ``path``; on success it replaces ``path`` whole.

    A folder cannot be renamed over another, so for a moment ``path`` is absent; it is never half-written.

    Raises:
        FullDiskError: in place of any error that says that the disk is full.
    """
    path = Path(path)
    with explained_full_disk(path), _workplace(path.parent) as folder:
        temporary = folder / path.name
        temporary.mkdir()
        with explained_full_disk(path):
            yield temporary
            temporary.chmod(_open_mode(0o777))
            for child in temporary.rglob("*"):
                if child.is_file():
                    _sync(child)
        if path.exists():
            os.replace(path, folder / f"{path.name}-before")
        os.replace(temporary, path)
        _sync(path.parent)


@contextlib.contextmanager
def _workplace(parent: Path) -> Iterator[Path]:
    """A folder of this process's own in ``parent``, for what is not yet whole; and those of killed processes go.

    Who works in one holds its lock, which goes with the process, however that ends.
    """
    parent.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(parent)
    folder, lock = _make_workplace(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _make_workplace(parent: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=TEMPORARY))
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue  # Taken for abandoned in the instant before it was locked.
        with contextlib.suppress(OSError):  # Where folders cannot be locked, none is ever taken for abandoned.
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder, lock
        os.close(lock)


def _clear_abandoned(parent: Path) -> None:
    with os.scandir(parent) as entries:
        folders = [entry.path for entry in entries if entry.name.startswith(TEMPORARY) and entry.is_dir()]
    for folder in folders:
        try:
            lock = os.open(folder, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            pass  # Its process is at work; or nobody can tell.
        finally:
            os.close(lock)


@contextlib.contextmanager
def explained_full_disk(path: str | Path) -> Iterator[None]:
    """Turn any error that says that the disk is full into one that says so about ``path``, with the room there is.

    Raises:
        FullDiskError: in its place. Other errors are left alone.
    """
    try:
        yield
    except Exception as error:
        number = _full_disk(error)
        if number is None:
            raise
        text = f"{FULL[number].format(room=_room(Path(path)))}, and the same command goes on from here"
        if isinstance(error, FullDiskError):
            if not any(part.startswith(TEMPORARY) for part in Path(error.filename).parts):
                raise
            text = error.strerror or text
        raise FullDiskError(number, text, str(path)) from None


def _full_disk(error: BaseException | None) -> int | None:
    """Which of the errors in `FULL` this is, or was raised for. Libraries that write by themselves only name it."""
    while error is not None:
        number = getattr(error, "errno", None)
        found = re.search(r"(?:os error |Errno )(\d+)", str(error))
        for one in (number, int(found[1]) if found else None):
            if one in FULL:
                return one
        error = error.__cause__ or error.__context__
    return None


def _room(path: Path) -> str:
    """` (1.2 of 34.0 MB free)`, of the disk of a file that need not be there."""
    with contextlib.suppress(OSError):
        there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        usage = shutil.disk_usage(there)
        unit, size = ("GB", 1e9) if usage.free > 1e9 else ("MB", 1e6)
        return f" ({usage.free / size:.1f} of {usage.total / size:.1f} {unit} free)"
    return ""


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


def canonical_json(value: Any) -> str:
    """Return JSON that is the same text for equal values: sorted keys, no white space. For digests and identities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


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
