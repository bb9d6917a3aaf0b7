"""Prompt CSVs: one edit per row, checked, each with a name that is safe as a file name."""

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

from tav.config.characters import has_control_characters
from tav.config.csv_rows import read_csv_rows
from tav.config.paths import project_path
from tav.config.presets import NOT_FILES, PRESETS
from tav_model.errors import TavError
from tav_model.files import atomic_file

# In the order of the documentation; only `prompt` is required.
COLUMNS = (
    "prompt",
    "name",
    "seed",
    "guidance_scale",
    "steps",
    "negative_prompt",
    "category",
    "preset",
    "mask",
    "control_scale",
)
# The columns that decide a row's video.
CONTENT_COLUMNS = ("prompt", "seed", "guidance_scale", "steps", "negative_prompt", "preset", "mask", "control_scale")
CATEGORIES = ("style", "object", "background", "multiple", "colour")
FILE_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9 _.-]{0,78}[A-Za-z0-9_-])?")
# Names that Windows reserves for devices, with any suffix.
RESERVED_NAME = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
LONGEST_SLUG = 60


@dataclass(frozen=True)
class PromptRow:
    """One edit as its row in the CSV; None where a cell is empty and params.yaml decides.

    Attributes:
        line: line of the file on which the row begins, from 1.
        prompt: what the edited video shows.
        name: name of the edit's files, given in the row or made from the prompt.
        seed: seed of the noise, where `edit.start` is `random` or the preset has fresh noise.
        guidance_scale: scale of classifier-free guidance; 1: no guidance.
        steps: DDIM steps.
        negative_prompt: what the guidance steers away from.
        category: one of `CATEGORIES`, by which scores are grouped.
        preset: one of `tav.config.presets.PRESETS`.
        mask: a path in the project, or `words`.
        control_scale: scale of all control networks.
    """

    line: int
    prompt: str
    name: str
    seed: int | None = None
    guidance_scale: float | None = None
    steps: int | None = None
    negative_prompt: str | None = None
    category: str | None = None
    preset: str | None = None
    mask: str | None = None
    control_scale: float | None = None


@dataclass(frozen=True)
class EditRow:
    """One edit with every setting: the row's own where its cell is filled, else that of params.yaml.

    Attributes:
        name: name of the edit's files.
        prompt: what the edited video shows.
        category: one of `CATEGORIES`, or None.
        negative_prompt: what the guidance steers away from.
        guidance_scale: scale of classifier-free guidance; 1: no guidance.
        steps: DDIM steps.
        seed: seed of the noise, where `edit.start` is `random` or the preset has fresh noise.
        identity: digest of everything that decides the video; an edit that is done has its identity in its record.
        preset: one of `tav.config.presets.PRESETS`.
        mask: a path in the project, `words`, `difference`, or `none` where the row has none by its own choice; None: no mask.
        control_scale: scale of all control networks; None: as the parameters set it.
    """

    name: str
    prompt: str
    category: str | None
    negative_prompt: str
    guidance_scale: float
    steps: int
    seed: int
    identity: str
    preset: str = "tune-a-video"
    mask: str | None = None
    control_scale: float | None = None

    @property
    def batch_key(self) -> tuple[float, int, str, str | None, float | None]:
        """Return the settings that edits must share to be sampled in one batch."""
        return self.guidance_scale, self.steps, self.preset, self.mask, self.control_scale


def read_prompts(path: Path) -> list[PromptRow]:
    """Return the rows of a prompt CSV: UTF-8 (with or without a byte-order mark), commas, a header from `COLUMNS`.

    A row without a name is named after its prompt. Where two prompts result in the same name, a digest of the row's
    content is appended, so that names do not depend on the order of rows.

    Raises:
        TavError: with the file and the line: unknown, duplicate or missing columns, rows that are too long or too short,
            empty prompts, invalid numbers, unsafe or duplicate names, no rows at all.
    """
    table = _read_table(path)
    header = _check_header(path, table)
    rows = [
        _check_row(f"{path}: line {line}", {"line": line, **dict(zip(header, cells, strict=True))})
        for line, cells in table[1:]
    ]
    return _name_rows(path, rows)


def make_rows(prompts: Sequence[str], what: str, **settings: Any) -> list[PromptRow]:
    """Return the rows of a CSV with these prompts, each distinct prompt once.

    Args:
        prompts: the prompts, one for each row.
        what: where they come from, for messages, such as `--edit`.
        **settings: cells of all rows, by column; None leaves the cell empty.

    Raises:
        TavError: an empty prompt, or a cell that a CSV may not have.
    """
    cells = {name: str(value) for name, value in settings.items() if value is not None}
    distinct = dict.fromkeys(prompt.strip() for prompt in prompts)
    rows = [_check_row(what, {"line": line, "prompt": prompt, **cells}) for line, prompt in enumerate(distinct, 1)]
    return _name_rows(Path(what), rows)


def append_rows(path: Path, rows: Sequence[PromptRow]) -> list[PromptRow]:
    """Append rows to a prompt CSV, except those that it has already, and return the new ones as read from the file.

    The file's lines are unchanged, unless the rows need a column that the file does not have.

    Raises:
        TavError: as for `read_prompts`, about the file as it is or as it would become; the file is unchanged.
    """
    existing = {_content(row) for row in read_prompts(path)}
    new = [row for row in rows if _content(row) not in existing]
    if not new:
        return []
    raw = path.read_bytes()
    text = raw.decode("utf-8-sig")
    table = _read_table(path)
    header = _check_header(path, table)
    missing = [name for name in CONTENT_COLUMNS if name not in header and any(_cells(row)[name] for row in new)]
    added = [[_cells(row).get(name, "") for name in (*header, *missing)] for row in new]
    newline = "\r\n" if "\r\n" in text else "\n"
    if missing:
        widened = [[*cells, *[""] * len(missing)] for _, cells in table[1:]]
        text = csv_text([[*header, *missing], *widened, *added], newline)
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
    """Return rows of cells as the text of a CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator=newline).writerows(rows)
    return text.getvalue()


def _content(row: PromptRow) -> tuple[Any, ...]:
    return tuple(getattr(row, name) for name in CONTENT_COLUMNS)


def _cells(row: PromptRow) -> dict[str, str]:
    values = {name: getattr(row, name) for name in CONTENT_COLUMNS}
    return {name: "" if value is None else str(value) for name, value in values.items()}


def _read_table(path: Path) -> list[tuple[int, list[str]]]:
    """Return the rows, the header first, each after the line on which it begins."""
    table = read_csv_rows(path, str(path))
    if len(table) < 2:
        raise TavError(f"{path}: no rows; it needs a header with the column 'prompt', and one row for each edit")
    return table


def _check_header(path: Path, table: list[tuple[int, list[str]]]) -> list[str]:
    number, cells = table[0]
    header = [cell.strip() for cell in cells]
    where = f"{path}: line {number}"
    for name in header:
        if name not in COLUMNS:
            raise TavError(f"{where}: unknown column {name!r}; allowed: {', '.join(COLUMNS)}")
        if header.count(name) > 1:
            raise TavError(f"{where}: duplicate column {name!r}")
    if "prompt" not in header:
        raise TavError(f"{where}: the column 'prompt' is missing")
    for line, cells in table[1:]:
        if len(cells) != len(header):
            raise TavError(
                f"{path}: line {line}: {len(cells)} cells, but the header has {len(header)}; "
                "put a prompt that contains a comma in quotes"
            )
    return header


def _check_row(where: str, record: dict[str, Any]) -> PromptRow:
    # Git or an editor may change the line ends of a file; prompts, and with them the edits' identities, must not change.
    cells = {name: record.get(name, "").replace("\r\n", "\n").replace("\r", "\n").strip() for name in COLUMNS}

    def error(column: str, allowed: str) -> TavError:
        return TavError(f"{where}: {column}: {cells[column][:80]!r} is not {allowed}")

    def number(column: str, kind: Callable[[str], Any], low: int, high: int) -> Any:
        text = cells[column]
        if not text:
            return None
        allowed = f"a {'whole ' if kind is int else ''}number between {low} and {high}"
        # Python also accepts 1_000 and the digits of other scripts.
        if not text.isascii() or "_" in text:
            raise error(column, allowed)
        try:
            value = kind(text)
        except ValueError:
            raise error(column, allowed) from None
        if not low <= value <= high:  # Also true for NaN.
            raise error(column, allowed)
        return value

    if not cells["prompt"]:
        raise TavError(f"{where}: the prompt is empty")
    for column in ("prompt", "negative_prompt"):
        if has_control_characters(cells[column]):
            raise error(column, "a string without control characters")
    if cells["category"] and cells["category"] not in CATEGORIES:
        raise error("category", f"one of {', '.join(CATEGORIES)}")
    if cells["preset"] and cells["preset"] not in PRESETS:
        raise error("preset", f"one of {', '.join(PRESETS)}")
    if cells["mask"] and cells["mask"] not in NOT_FILES:
        try:
            project_path(Path(), cells["mask"], "")
        except TavError as reason:
            raise error(
                "mask", f"{', '.join(NOT_FILES)}, or a path inside the project ({str(reason).rpartition(': ')[2]})"
            ) from None
    name = cells["name"]
    if name and (not FILE_NAME.fullmatch(name) or RESERVED_NAME.fullmatch(name)):
        raise error(
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
        preset=cells["preset"] or None,
        mask=cells["mask"] or None,
        control_scale=number("control_scale", float, 0, 2),
    )


def _name_rows(path: Path, rows: list[PromptRow]) -> list[PromptRow]:
    """Name the rows that have no name, and refuse names that are equal on a case-insensitive file system."""
    first_lines: dict[PromptRow, int] = {}
    for row in rows:
        first = first_lines.setdefault(replace(row, line=0), row.line)
        if first != row.line:
            raise TavError(f"{path}: line {row.line}: the same row as line {first}; remove one of them")
    unnamed_by_slug: dict[str, list[PromptRow]] = {}
    for row in rows:
        if not row.name:
            unnamed_by_slug.setdefault(_slug(row.prompt), []).append(row)
    given = {row.name.lower() for row in rows if row.name}
    made: dict[int, str] = {}
    for slug, unnamed in unnamed_by_slug.items():
        for row in unnamed:
            unique = slug and len(unnamed) == 1 and slug not in given and not RESERVED_NAME.fullmatch(slug)
            made[row.line] = slug if unique else f"{slug or 'edit'}-{_content_hash(row)}"
    named = [row if row.name else replace(row, name=made[row.line]) for row in rows]
    rows_by_name: dict[str, PromptRow] = {}
    for row in named:
        earlier = rows_by_name.setdefault(row.name.lower(), row)
        if earlier is not row:
            case = "" if earlier.name == row.name else f", as {earlier.name!r} (upper and lower case are the same)"
            raise TavError(
                f"{path}: line {row.line}: the name {row.name!r} is already used in line {earlier.line}{case}"
            )
    return named


def _slug(prompt: str) -> str:
    ascii_only = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode()
    words = re.findall(r"[a-z0-9]+", ascii_only.lower())
    slug = ""
    for word in words:
        if len(slug) + len(word) + 1 > LONGEST_SLUG:
            break
        slug = f"{slug}-{word}" if slug else word
    return slug or (words[0][:LONGEST_SLUG] if words else "")


def _content_hash(row: PromptRow) -> str:
    # The names of existing results contain this digest of a `repr`, so its form must not change.
    content = repr((row.prompt, row.seed, row.guidance_scale, row.steps, row.negative_prompt, row.category))
    if row.preset or row.mask:
        content += repr((row.preset, row.mask))
    if row.control_scale is not None:
        content += repr(row.control_scale)
    return hashlib.sha256(content.encode()).hexdigest()[:12]
