"""Read back the records and scores that the stages write beside their videos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tav_model.errors import TavError
from tav_model.files import read_json

# The files of one rendered row: video, preview, record.
EDIT_SUFFIXES = (".mp4", ".webp", ".json")
# How the picture of a mask begins in a row's record.
MASK_IMAGE = "data:image/png;base64,"


def read_record(path: Path) -> dict[str, Any]:
    """Return the JSON record of a rendered row, or an empty mapping where it is missing or damaged."""
    try:
        record = read_json(path)
    except TavError:
        return {}
    return record if isinstance(record, dict) else {}


def read_scores(folder: Path) -> dict[str, dict[str, float]]:
    """Return the metrics of each edit, by the edit's name, from the `scores.csv` in a folder."""
    import pandas as pd

    table = pd.read_csv(folder / "scores.csv", dtype={"name": str}).set_index("name")
    table = table.drop(columns=["prompt", "category"])
    # Edits without ground truth have fewer metrics.
    return {name: row.dropna().to_dict() for name, row in table.iterrows()}
