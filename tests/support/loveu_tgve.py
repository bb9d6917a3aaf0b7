"""A small LOVEU-TGVE-2023 on disk, in the layout of the real one."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from toyworld.captions import caption
from toyworld.clips import CLIPS
from toyworld.renderer import render_clip

CATEGORIES = ("style", "object", "background", "multiple")
NAMES = {"DAVIS_480p": "ball", "youtube_480p": "fish"}
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


def write_benchmark(folder: Path) -> Path:
    """Two of toyworld's clips with four edits each, as frames of 480x480."""
    clips = {}
    for of_set, name in NAMES.items():
        clip = CLIPS[name]
        frames = folder / of_set / "480p_frames" / name
        frames.mkdir(parents=True)
        for number, picture in enumerate(render_clip(clip.scene, 4)):
            Image.fromarray(picture).resize((480, 480)).save(frames / f"{number:05}.jpg", quality=90)
        edits = {clip.category(edit): caption(edited) for edit, edited in clip.edits.items()}
        clips[of_set] = [(name, caption(clip.scene), *(edits[category] for category in CATEGORIES))]
    write_table(folder, clips)
    return folder


QUICK = {
    "decode.frames": 2,
    "decode.width": 64,
    "decode.height": 64,
    "tune.steps": 1,
    "invert.steps": 1,
    "edit.steps": 1,
    "runtime.device": "cpu",
    "runtime.edit_batch": 4,
    "tracking.uri": "null",
}


def quick_overrides(**changes: object) -> list[str]:
    """`KEY=VALUE` for a benchmark of seconds; `edit__steps=3` changes `edit.steps`."""
    values = QUICK | {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={value}" for key, value in values.items()]
