"""The scores of clips as tables for a terminal."""

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
    """Return a table for each clip that has scores, from the source to the mean, and the paths of its images and report.

    Raises:
        TavError: None of the clips has scores.
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
        report_text = report if (root / report).exists() else f"not written yet; run tav report {clip}"
        parts.append(f"{title}\n\n{numbers}\n\nvideos:  {edits}/\npicture: {sheet}\nreport:  {report_text}")
    if not parts:
        raise TavError(f"no scores yet for {', '.join(clips)}; run dvc repro")
    return "\n\n".join(parts)


def _width() -> int | None:
    """Return the terminal's width, at which pandas wraps columns; None if the output is not a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
