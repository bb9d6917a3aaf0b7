"""The records that the stages leave beside their videos, read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tav_model.errors import TavError
from tav_model.files import read_json

EDIT_SUFFIXES = (".mp4", ".webp", ".json")
"""The files of one rendered row: video, preview, record."""


def read_record(path: Path) -> dict[str, Any]:
    """What the JSON of a rendered row says; nothing where it is missing or somebody has damaged it."""
    try:
        record = read_json(path)
    except TavError:
        return {}
    return record if isinstance(record, dict) else {}


def read_scores(folder: Path) -> dict[str, dict[str, float]]:
    """The metrics of each edit, by its name, from the ``scores.csv`` in ``folder``."""
    import pandas as pd

    table = pd.read_csv(folder / "scores.csv", dtype={"name": str}).set_index("name")
    table = table.drop(columns=["prompt", "category"])
    # Edits without a known truth have fewer.
    return {name: row.dropna().to_dict() for name, row in table.iterrows()}
