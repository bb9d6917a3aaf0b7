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


def mask_image(record: Mapping[str, Any]) -> str:
    """Return the picture of the mask in a row's record, as a data: URI; empty where there is none, or something else."""
    image = record.get("mask_image")
    return image if isinstance(image, str) and image.startswith(MASK_IMAGE) else ""


def decode_mask_image(record: Mapping[str, Any]) -> bytes:
    """Return that picture as a PNG; empty where there is none, or a damaged one."""
    try:
        return base64.b64decode(mask_image(record).removeprefix(MASK_IMAGE), validate=True)
    except binascii.Error:
        return b""


def read_scores(folder: Path) -> dict[str, dict[str, float]]:
    """Return the metrics of each edit, by the edit's name, from the `scores.csv` in a folder."""
    import pandas as pd

    table = pd.read_csv(folder / "scores.csv", dtype={"name": str}).set_index("name")
    table = table.drop(columns=["prompt", "category"])
    # Edits without ground truth have fewer metrics.
    return {name: row.dropna().to_dict() for name, row in table.iterrows()}
