"""Files and folders that are either complete or absent, and JSON."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tav_model.disk_space import FULL_DISK_ERRORS, TEMPORARY, explained_full_disk
from tav_model.errors import TavError

LARGEST_JSON = 256 * 2**20  # bytes


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path on the disk of `path`. On success the file is renamed to `path`, on failure it is removed.

    The temporary name keeps the suffix, because video writers choose the container by it.

    Raises:
        FullDiskError: in place of any error that means that the disk is full.
    """
    path = Path(path)
    with explained_full_disk(path), _temporary_folder(path.parent) as folder:
        temporary = folder / path.name
        temporary.touch()  # Python asks for mode 0666, from which the system takes the user's umask.
        mode = stat.S_IMODE(temporary.stat().st_mode)
        with explained_full_disk(path):  # Here too, because what was written so far still takes up space.
            yield temporary
            temporary.chmod(mode)  # Some libraries write files that only their owner can read.
            _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder on the disk of `path`. On success it replaces `path`, on failure it is removed.

    A folder cannot be renamed over another, so for a moment `path` is absent; it is never half-written.

    Raises:
        FullDiskError: in place of any error that means that the disk is full.
    """
    path = Path(path)
    with explained_full_disk(path), _temporary_folder(path.parent) as folder:
        temporary = folder / path.name
        temporary.mkdir()  # mode 0777 less the user's umask
        mode = stat.S_IMODE(temporary.stat().st_mode)
        with explained_full_disk(path):
            yield temporary
            temporary.chmod(mode)
            for child in temporary.rglob("*"):
                if child.is_file():
                    _sync(child)
        if path.exists():
            os.replace(path, folder / f"{path.name}-before")
        os.replace(temporary, path)
        _sync(path.parent)


def write_problem(folder: str | Path) -> str | None:
    """Return why no file can be written to a folder, which may be missing; None where one can.

    It is found out by writing to the folder, or to that in which it would be made, because permissions alone do not tell:
    a file system may be mounted read-only.

    Raises:
        FullDiskError: the disk is full.
    """
    path = Path(folder)
    existing = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not existing.is_dir():
        return os.strerror(errno.ENOTDIR)
    with explained_full_disk(folder):
        try:
            with _temporary_folder(existing) as temporary:
                (temporary / "file").touch()
        except OSError as error:
            if error.errno in FULL_DISK_ERRORS:
                raise
            return error.strerror or str(error)
    return None


def _sync(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    """Yield a new folder in `parent` for incomplete files, and remove those that killed processes left there.

    Its writer holds a lock on it, which the system releases when the process ends, in whatever way.
    """
    parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(parent)
    folder, lock = _make_temporary_folder(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _make_temporary_folder(parent: Path) -> tuple[Path, int]:
    """Return a new folder and the descriptor that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=TEMPORARY))
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue  # Another process took it for abandoned before it was locked.
        with contextlib.suppress(OSError):  # Where folders cannot be locked, none is ever taken for abandoned.
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder, lock
        os.close(lock)


def _remove_abandoned(parent: Path) -> None:
    """Remove the temporary folders in `parent` whose lock nobody holds."""
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
            pass  # Its process is still writing, or the file system has no locks.
        finally:
            os.close(lock)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file atomically, indented by two spaces."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_text(path: str | Path, most: int) -> str:
    """Return the text of a UTF-8 file of at most `most` bytes, including a byte-order mark.

    Raises:
        TavError: not a regular file, such as a pipe, which may never end; or a larger one.
        OSError, UnicodeDecodeError: as Python's own functions.
    """
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise TavError(f"{path}: is not a file")
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise TavError(f"{path}: too large; at most {most // 2**20} MiB are allowed")
    return content.decode("utf-8")


def read_user_text(path: Path, name: str, most: int) -> str:
    """Return the text of a file that a user wrote, as `read_text` does.

    Args:
        path: the file.
        name: its name in messages.
        most: bytes allowed.

    Raises:
        TavError: the file is missing, too large, unreadable or not UTF-8.
    """
    try:
        return read_text(path, most)
    except FileNotFoundError:
        raise TavError(f"{name}: no such file") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise TavError(f"{name}: line {line}: not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise TavError(f"{name}: cannot be read ({error.strerror})") from None


def read_json(path: str | Path) -> Any:
    """Return the value in a JSON file.

    Raises:
        TavError: the file is missing, damaged, too large, or nested too deeply.
    """
    try:
        return json.loads(read_text(path, LARGEST_JSON))
    except FileNotFoundError:
        raise TavError(f"{path}: no such file") from None
    except OSError as error:
        raise TavError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # A number of thousands of digits raises a plain ValueError.
        raise TavError(f"{path}: not a JSON file ({error})") from None
