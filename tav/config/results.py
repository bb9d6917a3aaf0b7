"""Read back the records and scores that the stages write beside their videos."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
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


def decode_mask_image(record: Mapping[str, Any]) -> bytes:
    """Return the PNG of the mask that a row's record holds; empty where there is none, or something else."""
    image = record.get("mask_image")
    if not isinstance(image, str) or not image.startswith(MASK_IMAGE):
        return b""
    try:
        return base64.b64decode(image.removeprefix(MASK_IMAGE), validate=True)
    except binascii.Error:
        return b""


def read_scores(folder: Path) -> dict[str, dict[str, float]]:
    """Return the metrics of each edit, by the edit's name, from the `scores.csv` in a folder."""
    import pandas as pd

    table = pd.read_csv(folder / "scores.csv", dtype={"name": str}).set_index("name")
    table = table.drop(columns=["prompt", "category"])
    # Edits without ground truth have fewer metrics.
    return {name: row.dropna().to_dict() for name, row in table.iterrows()}
