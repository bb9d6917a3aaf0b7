"""Read the LOVEU-TGVE-2023 benchmark from disk: 76 clips with a caption and four edits each.

Its content exists in two forms. The data set (showlab/loveu-tgve-2023) has a table in its top folder:

    LOVEU-TGVE-2023_Dataset.csv
    DAVIS_480p/480p_frames/gold-fish/*.jpg     32 or 128 numbered frames of 480x480
    DAVIS_480p/480p_videos/gold-fish.mp4       the same as a video, used where there are no frames
    youtube_480p/...  videvo_480p/...

In the table, a line such as `DAVIS Videos:` is the heading of a set, and empty lines separate the sets. The other form is
the repository's configuration files: one `SET/CLIP.yaml` for each clip, anywhere below the folder, in the format of
Tune-A-Video's code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tav.config.characters import has_control_characters
from tav.config.csv_rows import read_csv_rows
from tav.config.paths import project_path
from tav.media.frame_readers import IMAGE_SUFFIXES
from tav_model.errors import TavError, first_line

TABLE = "LOVEU-TGVE-2023_Dataset.csv"
SETS = ("DAVIS_480p", "youtube_480p", "videvo_480p")
EDITS = ("style", "object", "background", "multiple")
NAME, CAPTION = "Video name", "Our GT caption"
COLUMNS = {
    "style": "Style Change Caption",
    "object": "Object Change Caption",
    "background": "Background Change Caption",
    "multiple": "Multiple Changes Caption",
}
SIDE = 480  # Pixels of a frame, in the data set and in a submission.
HEADING = re.compile(r"(\w+) videos:?", re.IGNORECASE)
# With the name of its set in front, such a name has at most the length that params.yaml allows.
CLIP_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,47}")
LARGEST_YAML = 2**20


@dataclass(frozen=True)
class Entry:
    """One clip of the benchmark.

    Attributes:
        set: one of `SETS`.
        clip: its name within the set.
        caption: description of the video.
        prompts: the prompt of each category in `EDITS`.
        frames: its folder of numbered images, or its video; None where the benchmark's folder has neither.
        source: where it is defined, for messages: a file, or a file and a line.
    """

    set: str
    clip: str
    caption: str
    prompts: dict[str, str]
    frames: Path | None
    source: str

    @property
    def name(self) -> str:
        """Return the name in the benchmark: `DAVIS_480p/gold-fish`."""
        return f"{self.set}/{self.clip}"

    @property
    def clip_name(self) -> str:
        """Return the name of the clip in params.yaml: `davis_480p-gold-fish`."""
        return f"{self.set.lower()}-{self.clip}"


def read_benchmark(folder: Path) -> list[Entry]:
    """Return the clips of a benchmark in order: from the table in its top folder or, without one, from its YAML files.

    Raises:
        TavError: no such folder, or neither form in it; with the file and the line or key: a missing column, caption or
            prompt, a duplicate clip, a name or a path that is not allowed, or frames outside the folder.
    """
    if not folder.is_dir():
        raise TavError(f"{folder}: no such folder; must be the one that LOVEU-TGVE-2023 was unpacked into")
    table = folder / TABLE
    entries = list(_read_table(table) if table.is_file() else _read_configs(folder))
    if not entries:
        raise TavError(f"{folder}: no clips: must contain {TABLE}, or SET/CLIP.yaml for SET in {', '.join(SETS)}")
    first: dict[str, str] = {}
    for entry in entries:
        other = first.setdefault(entry.name, entry.source)
        if other != entry.source:
            raise TavError(f"{entry.source}: {entry.name} is already defined in {other}")
    return entries


def choose(entries: Sequence[Entry], only: Sequence[str] = ()) -> list[Entry]:
    """Return the entries that `only` names (SET/CLIP), or all entries.

    Raises:
        TavError: no such clip, or a clip without frames.
    """
    names = {entry.name: entry for entry in entries}
    for name in only:
        if name not in names:
            examples = ", ".join(list(names)[:4]) + (", ..." if len(names) > 4 else "")
            raise TavError(f"--only: no clip {name!r}; must be SET/CLIP, one of: {examples}")
    chosen = [entry for entry in entries if not only or entry.name in only]
    for entry in chosen:
        if entry.frames is None:
            raise TavError(
                f"{entry.source}: {entry.name} has no frames; needs images in {entry.set}/480p_frames/"
                f"{entry.clip}/, or {entry.set}/480p_videos/{entry.clip}.mp4"
            )
    return chosen


# The table


def _read_table(path: Path) -> Iterable[Entry]:
    lines = read_csv_rows(path, path.name)
    if not lines:
        raise TavError(f"{path.name}: is empty; needs the columns {', '.join((NAME, CAPTION, *COLUMNS.values()))}")
    number, cells = lines[0]
    header = [cell.strip() for cell in cells]
    for column in (NAME, CAPTION, *COLUMNS.values()):
        if header.count(column) != 1:
            how = "is missing" if column not in header else "appears twice"
            raise TavError(f"{path.name}: line {number}: the column {column!r} {how}; there are: {', '.join(header)}")
    of_set: str | None = None
    for number, cells in lines[1:]:
        where = f"{path.name}: line {number}"
        row = dict(zip(header, (cell.strip() for cell in cells), strict=False))
        texts = [row.get(column, "") for column in (CAPTION, *COLUMNS.values())]
        if not any((row.get(NAME, ""), *texts)):
            continue
        if not any(texts):
            of_set = _set_of_heading(row[NAME], where)
        elif of_set is None:
            raise TavError(f"{where}: a clip before the first heading, such as 'DAVIS Videos:', which names its set")
        else:
            yield _table_entry(path.parent, of_set, row, where)


def _set_of_heading(text: str, where: str) -> str:
    """Return the set of a heading: `DAVIS_480p` for `DAVIS Videos:`."""
    sets = {name.partition("_")[0].lower(): name for name in SETS}
    found = HEADING.fullmatch(text)
    if found is None:
        raise TavError(f"{where}: {text[:80]!r} has no caption and no prompts; a clip needs all five")
    if found[1].lower() not in sets:
        headings = ", ".join(f"'{name.partition('_')[0]} Videos:'" for name in SETS)
        raise TavError(f"{where}: {text!r} is not a set of the benchmark; allowed: {headings}")
    return sets[found[1].lower()]


def _table_entry(folder: Path, of_set: str, row: dict[str, str], where: str) -> Entry:
    clip = _clip_name(row[NAME], f"{where}: {NAME}")
    places = (folder / of_set / "480p_frames" / clip, folder / of_set / "480p_videos" / f"{clip}.mp4")
    return Entry(
        set=of_set,
        clip=clip,
        caption=_text(row[CAPTION], f"{where}: {CAPTION}"),
        prompts={edit: _text(row.get(column, ""), f"{where}: {column}") for edit, column in COLUMNS.items()},
        frames=_first_existing(folder, places, where),
        source=where,
    )


# One YAML file per clip


def _read_configs(folder: Path) -> Iterable[Entry]:
    suffixes = (".yaml", ".yml")
    paths = [p for p in folder.rglob("*") if p.suffix in suffixes and p.parent.name in SETS and p.is_file()]
    order = {name: place for place, name in enumerate(SETS)}
    for path in sorted(paths, key=lambda path: (order[path.parent.name], path.stem, str(path))):
        yield _config_entry(folder, path)


def _config_entry(folder: Path, path: Path) -> Entry:
    where = path.relative_to(folder).as_posix()
    content = _load_config(path, where)
    prompts = _value(content, where, "validation_data", "prompts")
    if not isinstance(prompts, dict) or set(prompts) != set(EDITS):
        has = ", ".join(map(str, prompts)) if isinstance(prompts, dict) else type(prompts).__name__
        raise TavError(
            f"{where}: validation_data.prompts: must be a mapping with the keys {', '.join(EDITS)}; is: {has[:80]}"
        )
    what = f"{where}: train_data.video_path"
    video_path = _text(_value(content, where, "train_data", "video_path"), what)
    project_path(folder, video_path, what)
    # The path is relative to where the original code was run. Use its longest ending that exists in this folder.
    parts = Path(video_path).parts
    return Entry(
        set=path.parent.name,
        clip=_clip_name(path.stem, where),
        caption=_text(_value(content, where, "train_data", "prompt"), f"{where}: train_data.prompt"),
        prompts={edit: _text(prompts[edit], f"{where}: validation_data.prompts.{edit}") for edit in EDITS},
        frames=_first_existing(folder, (folder.joinpath(*parts[i:]) for i in range(len(parts))), what),
        source=where,
    )


def _load_config(path: Path, where: str) -> Any:
    import yaml

    if path.stat().st_size > LARGEST_YAML:
        raise TavError(f"{where}: is larger than 1 MiB; not a clip's configuration")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}:" if error.problem_mark else ""
        raise TavError(f"{where}:{line} not YAML ({error.problem})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise TavError(f"{where}: not YAML ({first_line(error)})") from None


def _value(content: Any, where: str, *keys: str) -> Any:
    for number, key in enumerate(keys):
        if not isinstance(content, dict) or key not in content:
            raise TavError(f"{where}: {'.'.join(keys[: number + 1])} is missing")
        content = content[key]
    return content


# Both forms


def _clip_name(text: str, where: str) -> str:
    if not CLIP_NAME.fullmatch(text):
        raise TavError(f"{where}: {text[:80]!r} is not allowed: must be 1 to 48 of a-z, 0-9, _ and -")
    return text


def _text(value: Any, where: str) -> str:
    """Return a caption or prompt on one line: tokenizers ignore line ends and repeated spaces, so each becomes a space."""
    if not isinstance(value, str) or not value.strip():
        raise TavError(f"{where}: must be a non-empty string")
    text = " ".join(value.split())
    if has_control_characters(text):
        raise TavError(f"{where}: {text[:80]!r} is not allowed: must be a string without control characters")
    return text


def _first_existing(folder: Path, places: Iterable[Path], where: str) -> Path | None:
    """Return the first of the places that is a video, or a folder with images, with symbolic links resolved.

    Raises:
        TavError: it is outside the folder.
    """
    for place in places:
        if place.is_file() or (
            place.is_dir() and any(path.suffix.lower() in IMAGE_SUFFIXES for path in place.iterdir())
        ):
            resolved = place.resolve()
            if not resolved.is_relative_to(folder.resolve()):
                raise TavError(f"{where}: {place} leads out of {folder}, to {resolved}; must be inside")
            return resolved
    return None
