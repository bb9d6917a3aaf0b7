"""Atomic files and folders: permissions, failures, and JSON as it was written."""

import errno
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tav_model.errors import FullDiskError, TavError
from tav_model.files import atomic_file, atomic_folder, read_json, read_text, write_json, write_problem, write_text


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_folder_that_cannot_be_written_to_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert write_problem(tmp_path / "new/folder") is None
    assert [*tmp_path.iterdir()] == []
    (tmp_path / "new").mkdir()
    assert write_problem(tmp_path / "new") is None and [*(tmp_path / "new").iterdir()] == []
    (tmp_path / "file").touch()
    (tmp_path / "broken").symlink_to(tmp_path / "missing/folder")
    for name in ("file", "file/folder", "broken", "broken/folder"):
        assert write_problem(tmp_path / name) == "Not a directory"

    def fails(number: int) -> None:
        def touch(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(Path, "touch", touch)

    fails(errno.EROFS)
    assert write_problem(tmp_path) == "Read-only file system"
    fails(errno.ENOSPC)
    with pytest.raises(FullDiskError):
        write_problem(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"new", "file", "broken"}


def test_permissions_are_those_that_the_umask_leaves(tmp_path: Path, umask: int) -> None:
    with atomic_file(tmp_path / "file") as temporary:
        temporary.unlink()
        os.close(os.open(temporary, os.O_CREAT, 0o600))  # as some libraries create their files
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "file").touch()
        temporary.chmod(0o700)
    assert mode(tmp_path / "file") == 0o666 & ~umask
    assert mode(tmp_path / "folder") == 0o777 & ~umask
    assert mode(tmp_path / "folder/file") == 0o666 & ~umask


def test_the_umask_of_the_process_is_never_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It belongs to all threads: one that creates a file at that moment would create it with the wrong permissions."""

    def refuse(mask: int) -> int:
        raise AssertionError(f"umask({mask:o}) was called")

    monkeypatch.setattr(os, "umask", refuse)
    write_text(tmp_path / "file", "text")
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "file").touch()
    assert read_text(tmp_path / "file", 10) == "text"
    assert (tmp_path / "folder/file").exists()


def test_threads_that_write_at_once_have_the_same_permissions(tmp_path: Path, umask: int) -> None:
    def write(i: int) -> tuple[int, int]:
        write_text(tmp_path / f"{i % 4}/{i}.txt", str(i))
        (tmp_path / f"plain-{i}").touch()
        return mode(tmp_path / f"{i % 4}/{i}.txt"), mode(tmp_path / f"plain-{i}")

    with ThreadPoolExecutor(8) as pool:
        modes = set(pool.map(write, range(64)))
    assert modes == {(0o666 & ~umask, 0o666 & ~umask)}
    assert all((tmp_path / f"{i % 4}/{i}.txt").read_text() == str(i) for i in range(64))


@pytest.mark.parametrize("make", [atomic_file, atomic_folder])
def test_a_failure_leaves_what_was_there(tmp_path: Path, make) -> None:
    path = tmp_path / "result"

    def write(text: str) -> None:
        with make(path) as temporary:
            (temporary if temporary.is_file() else temporary / "part").write_text(text)
            if text == "second":
                raise ZeroDivisionError

    write("first")
    before = {file: file.read_text() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(ZeroDivisionError):
        write("second")
    assert {file: file.read_text() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    value = {"name": "grüner Ball", "numbers": [1, 2.5, None, True], "empty": {}}
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json") == value
    assert (tmp_path / "value.json").read_text().startswith('{\n  "name": "grüner Ball",')


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), ("{", "not a JSON file"), ("[" * 100_000, "not a JSON file"), ("1" * 5000, "not a JSON")],
)
def test_unreadable_json_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "value.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(TavError, match=f"value.json: {message}"):
        read_json(path)


def test_more_text_than_allowed_and_pipes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "long").write_text("x" * 11)
    with pytest.raises(TavError, match="too large"):
        read_text(tmp_path / "long", 10)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TavError, match="is not a file"):
        read_text(tmp_path / "pipe", 10)
