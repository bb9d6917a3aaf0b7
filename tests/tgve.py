"""A small LOVEU-TGVE-2023 on disk, in the layout of the real one."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

HEADER = [
    "Video name",
    "Our GT caption",
    "Style Change Caption",
    "Object Change Caption",
    "Background Change Caption",
    "Multiple Changes Caption",
    "Source",
]
HEADINGS = {"DAVIS_480p": "DAVIS Videos:", "youtube_480p": "Youtube Videos:", "videvo_480p": "Videvo Videos:"}


def write_table(folder: Path, clips: Mapping[str, Sequence[tuple[str, ...]]]) -> Path:
    """The CSV at the top: for each set a heading, a line a clip (name, caption, four prompts) and an empty line."""
    path = folder / "LOVEU-TGVE-2023_Dataset.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        for name, rows in clips.items():
            writer.writerow([HEADINGS[name], *[""] * 6])
            writer.writerows([*row, "https://example.org/video"] for row in rows)
            writer.writerow([""] * 7)
    return path
