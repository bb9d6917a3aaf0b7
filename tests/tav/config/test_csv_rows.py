"""The rows of a CSV, with their lines and with refusals that name the file as the caller does."""

from pathlib import Path

import pytest

from tav.config.csv_rows import read_csv_rows
from tav_model.errors import TavError


def test_each_row_comes_with_the_line_on_which_it_begins(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('\ufeffa,b\n\n"two\nlines",1\n , \nlast,2\n', encoding="utf-8")
    assert read_csv_rows(path, "rows.csv") == [(1, ["a", "b"]), (3, ["two\nlines", "1"]), (6, ["last", "2"])]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, "the table: no such file"),
        (b"a\n\xff\n", "the table: line 2: not UTF-8; save the file as UTF-8"),
        (b'a\n"b\n', "the table: line 2: not CSV (unexpected end of data)"),
    ],
)
def test_refusals_name_the_file(tmp_path: Path, content: bytes | None, error: str) -> None:
    path = tmp_path / "rows.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TavError) as raised:
        read_csv_rows(path, "the table")
    assert str(raised.value) == error


def test_a_folder_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TavError, match="the table: cannot be read"):
        read_csv_rows(tmp_path, "the table")
