"""The rows of a CSV that a user wrote, each with the line on which it begins."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from tav_model.errors import TavError
from tav_model.files import read_user_text

LARGEST_FILE = 32 * 2**20  # Bytes.


def read_csv_rows(path: Path, name: str) -> list[tuple[int, list[str]]]:
    """Return the rows of cells of a CSV in UTF-8, the header first, each after the line on which it begins, from 1.

    Rows without text are left out; a byte-order mark is accepted.

    Args:
        path: the file.
        name: its name in messages.

    Raises:
        TavError: the file is missing, too large, unreadable, not UTF-8 or not CSV.
    """
    text = read_user_text(path, name, LARGEST_FILE).removeprefix("\ufeff")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows = []
    begin = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append((begin, cells))
            begin = reader.line_num + 1
    except csv.Error as error:
        raise TavError(f"{name}: line {begin}: not CSV ({error})") from None
    return rows
