"""The scores of the clips as a table for a terminal."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from tav.config import load_params
from tav.config.paths import Project
from tav.config.results import read_scores
from tav_model.errors import TavError
from tav_model.files import read_json


def show(root: Path, clips: list[str]) -> str:
    """A table for each clip that has scores, the source first and the mean last, and where its pictures
    and its report are.

    Raises:
        TavError: none of the clips has scores.
    """
    import pandas as pd

    project = Project(root)
    attention = load_params(root / "params.yaml").attention
    parts = []
    for clip in clips:
        path = project.scores(clip) / "metrics.json"
        if not path.exists():
            continue
        metrics = read_json(path)
        rows = {"(source)": metrics["source"], **read_scores(project.scores(clip)), "(mean)": metrics["mean"]}
        table = pd.DataFrame.from_dict(rows, orient="index")
        title = f"{clip}: attention {', '.join(attention.spatial)}{' + temporal' if attention.temporal else ''}"
        sheet = project.contact_sheet(clip).relative_to(root)
        edits = project.edits(clip).relative_to(root)
        numbers = table.to_string(na_rep="", float_format="{:.4f}".format, line_width=_width())
        report = project.report(clip).relative_to(root)
        made = report if (root / report).exists() else f"none here yet; tav report {clip} makes it"
        parts.append(f"{title}\n\n{numbers}\n\nvideos:  {edits}/\npicture: {sheet}\nreport:  {made}")
    if not parts:
        raise TavError(f"no scores yet for {', '.join(clips)}: dvc repro")
    return "\n\n".join(parts)


def _width() -> int | None:
    """Of the terminal; columns that do not fit go below the others. Elsewhere each row stays one line."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
