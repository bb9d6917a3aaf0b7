"""Prompt CSVs: one edit a row, checked, each with a name that is safe as a file name."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tav_model.errors import TavError
from tav_model.files import atomic_file, read_text

COLUMNS = ("prompt", "name", "seed", "guidance_scale", "steps", "negative_prompt", "category")
ROW_CELLS = ("prompt", "seed", "guidance_scale", "steps", "negative_prompt")
CATEGORIES = ("style", "object", "background", "multiple", "colour")
FILE_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9 _.-]{0,78}[A-Za-z0-9_-])?")
# Names that Windows keeps for devices, with any suffix.
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
SLUG_LENGTH = 60
LARGEST = 32 * 2**20


@dataclass(frozen=True)
class PromptRow:
    """One edit; None is for params.yaml to fill in. `line` is where the row begins in the file, from 1."""

    line: int
    prompt: str
    name: str
    seed: int | None = None
    guidance_scale: float | None = None
    steps: int | None = None
    negative_prompt: str | None = None
    category: str | None = None


@dataclass(frozen=True)
class EditRow:
    """A row with every setting filled in: the row's own where it has one, else those of params.yaml."""

    name: str
    prompt: str
    category: str | None
    negative_prompt: str
    guidance_scale: float
    steps: int
    seed: int
    identity: str

    @property
    def batch_key(self) -> tuple[float, int]:
        """Edits that agree in this can be sampled in one batch."""
        return self.guidance_scale, self.steps


def read_prompts(path: Path) -> list[PromptRow]:
    """The rows of a prompt CSV: UTF-8 (a byte-order mark is fine), commas, a header with the names in `COLUMNS`.

    A row without a name is named after its prompt; where two prompts give the same name, a digest of the row's content
    is added to it, so that names do not depend on the order of rows.

    Raises:
        TavError: with the file and the line: unknown, doubled or missing columns, rows that are too long or too short,
            empty prompts, bad numbers, unsafe or doubled names, no rows at all.
    """
    lines, table = _read_table(path)
    header = _check_header(path, lines, table)
    rows = [
        _check_row(f"{path}: line {line}", {"line": line, **dict(zip(header, cells, strict=True))})
        for line, cells in zip(lines[1:], table[1:], strict=True)
    ]
    return _name_rows(path, rows)


def make_rows(prompts: Sequence[str], what: str, **settings: Any) -> list[PromptRow]:
    """The rows that a CSV with these prompts would give, each prompt once.

    Args:
        what: such as `--edit`, for messages.
        settings: of all rows, by the column's name; None is left out.

    Raises:
        TavError: what a row may not have.
    """
    cells = {name: str(value) for name, value in settings.items() if value is not None}
    distinct = dict.fromkeys(prompt.strip() for prompt in prompts)
    rows = [_check_row(what, {"line": line, "prompt": prompt, **cells}) for line, prompt in enumerate(distinct, 1)]
    return _name_rows(Path(what), rows)


def append_rows(path: Path, rows: Sequence[PromptRow]) -> list[PromptRow]:
    """Add rows to a prompt CSV, those left out that it has already; returns the ones added, named as they are there.

    The file's lines stay as they are, unless a column that the rows want is missing.

    Raises:
        TavError: as `read_prompts`, of the file as it is or as it would be; it is as it was.
    """
    there = {_content(row) for row in read_prompts(path)}
    new = [row for row in rows if _content(row) not in there]
    if not new:
        return []
    raw = path.read_bytes()
    text = raw.decode("utf-8-sig")
    lines, table = _read_table(path)
    header = _check_header(path, lines, table)
    wanted = [name for name in ROW_CELLS if any(_cells(row)[name] for row in new)]
    missing = [name for name in wanted if name not in header]
    added = [[_cells(row).get(name, "") for name in (*header, *missing)] for row in new]
    newline = "\r\n" if "\r\n" in text else "\n"
    if missing:
        kept = [[*cells, *[""] * len(missing)] for cells in table[1:]]
        text = csv_text([[*header, *missing], *kept, *added], newline)
    else:
        text += ("" if text.endswith(("\n", "\r")) else newline) + csv_text(added, newline)
    with atomic_file(path) as temporary:
        temporary.write_bytes((codecs.BOM_UTF8 if raw.startswith(codecs.BOM_UTF8) else b"") + text.encode())
        try:
            after = read_prompts(temporary)
        except TavError as error:
            raise TavError(str(error).replace(str(temporary), str(path))) from None
    contents = {_content(row) for row in new}
    return [row for row in after if _content(row) in contents]


def csv_text(rows: Iterable[Sequence[Any]], newline: str = "\n") -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator=newline).writerows(rows)
    return text.getvalue()


def _content(row: PromptRow) -> tuple[Any, ...]:
    """All that decides a row's video."""
    return row.prompt, row.seed, row.guidance_scale, row.steps, row.negative_prompt


def _cells(row: PromptRow) -> dict[str, str]:
    values = {name: getattr(row, name) for name in ROW_CELLS}
    return {name: "" if value is None else str(value) for name, value in values.items()}


def _read_table(path: Path) -> tuple[list[int], list[list[str]]]:
    """The rows that are not empty, header first, and the line that each begins on."""
    try:
        text = read_text(path, LARGEST).removeprefix("\ufeff")
    except FileNotFoundError:
        raise TavError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise TavError(f"{path}: line {line}: not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise TavError(f"{path}: cannot be read ({error.strerror})") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    lines: list[int] = []
    table: list[list[str]] = []
    begin = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                lines.append(begin)
                table.append(cells)
            begin = reader.line_num + 1
    except csv.Error as error:
        raise TavError(f"{path}: line {begin}: not CSV ({error})") from None
    if len(table) < 2:
        raise TavError(f"{path}: no rows; a header with the column 'prompt', and one row for each edit, are needed")
    return lines, table


def _check_header(path: Path, lines: list[int], table: list[list[str]]) -> list[str]:
    header = [cell.strip() for cell in table[0]]
    where = f"{path}: line {lines[0]}"
    for name in header:
        if name not in COLUMNS:
            raise TavError(f"{where}: unknown column {name!r}; allowed: {', '.join(COLUMNS)}")
        if header.count(name) > 1:
            raise TavError(f"{where}: the column {name!r} twice")
    if "prompt" not in header:
        raise TavError(f"{where}: the column 'prompt' is missing")
    for line, cells in zip(lines[1:], table[1:], strict=True):
        if len(cells) != len(header):
            raise TavError(
                f"{path}: line {line}: {len(cells)} cells where the header has {len(header)}; "
                "a prompt with a comma needs quotes around it"
            )
    return header


def _check_row(where: str, record: dict[str, Any]) -> PromptRow:
    # Git or an editor may change a file's line ends; the prompts, and so what was rendered, stay the same.
    cells = {name: record.get(name, "").replace("\r\n", "\n").replace("\r", "\n").strip() for name in COLUMNS}

    def fail(column: str, allowed: str) -> TavError:
        return TavError(f"{where}: {column}: {cells[column][:80]!r} is not {allowed}")

    def number(column: str, kind: Callable[[str], Any], low: int, high: int) -> Any:
        text = cells[column]
        if not text:
            return None
        allowed = f"a {'whole ' if kind is int else ''}number between {low} and {high}"
        # Python would also take 1_000 and the digits of other scripts.
        if not text.isascii() or "_" in text:
            raise fail(column, allowed)
        try:
            value = kind(text)
        except ValueError:
            raise fail(column, allowed) from None
        if not low <= value <= high:  # nor is NaN
            raise fail(column, allowed)
        return value

    if not cells["prompt"]:
        raise TavError(f"{where}: the prompt is empty")
    for column in ("prompt", "negative_prompt"):
        if any(unicodedata.category(c) == "Cc" and c not in "\t\n" for c in cells[column]):
            raise fail(column, "a text without control characters")
    if cells["category"] and cells["category"] not in CATEGORIES:
        raise fail("category", f"one of {', '.join(CATEGORIES)}")
    name = cells["name"]
    if name and (not FILE_NAME.fullmatch(name) or RESERVED.fullmatch(name)):
        raise fail(
            "name", "a safe file name: 1 to 80 letters, digits, spaces and _ . -, beginning with a letter or digit"
        )
    return PromptRow(
        line=record["line"],
        prompt=cells["prompt"],
        name=name,
        seed=number("seed", int, 0, 2**63 - 1),
        guidance_scale=number("guidance_scale", float, 1, 100),
        steps=number("steps", int, 1, 1000),
        negative_prompt=cells["negative_prompt"] or None,
        category=cells["category"] or None,
    )


def _name_rows(path: Path, rows: list[PromptRow]) -> list[PromptRow]:
    """Give names to the rows that have none, and make sure that no two are the same to any file system."""
    same: dict[PromptRow, int] = {}
    for row in rows:
        other = same.setdefault(replace(row, line=0), row.line)
        if other != row.line:
            raise TavError(f"{path}: line {row.line}: the same row as line {other}; take one away")
    made: dict[str, list[PromptRow]] = {}
    for row in rows:
        if not row.name:
            made.setdefault(_slug(row.prompt), []).append(row)
    given = {row.name.lower() for row in rows if row.name}
    names: dict[int, str] = {}
    for slug, sharing in made.items():
        for row in sharing:
            clear = slug and len(sharing) == 1 and slug not in given and not RESERVED.fullmatch(slug)
            names[row.line] = slug if clear else f"{slug or 'edit'}-{_content_hash(row)}"
    named = [row if row.name else replace(row, name=names[row.line]) for row in rows]
    taken: dict[str, int] = {}
    for row in named:
        other = taken.setdefault(row.name.lower(), row.line)
        if other != row.line:
            raise TavError(f"{path}: line {row.line}: the name {row.name!r} is that of line {other} already")
    return named


def _slug(prompt: str) -> str:
    ascii_only = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode()
    words = re.findall(r"[a-z0-9]+", ascii_only.lower())
    slug = ""
    for word in words:
        if len(slug) + len(word) + 1 > SLUG_LENGTH:
            break
        slug = f"{slug}-{word}" if slug else word
    return slug or (words[0][:SLUG_LENGTH] if words else "")


def _content_hash(row: PromptRow) -> str:
    content = repr((row.prompt, row.seed, row.guidance_scale, row.steps, row.negative_prompt, row.category))
    return hashlib.sha256(content.encode()).hexdigest()[:12]
