"""A short params.yaml, and what tests of the parameters share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tav.config import load_params
from tav_model.errors import TavError

SHORT = """\
base_model: models/small  # a comment
seed: 33
attention: {}
decode: {frames: 8}
encode: {}
tune: {}
invert: {}
edit: {}
score: {}
clips:
  ball: {video: data/ball.mp4, caption: a ball, prompts: data/ball.csv, decode: {}}
  car: {video: data/car.mp4, caption: a car, prompts: data/car.csv, decode: {start: 3, width: 128, end: 40}}
"""


def refusal(path: Path, overrides: dict[str, Any] | None = None) -> str:
    """Return the message with which `load_params` refuses a file."""
    with pytest.raises(TavError) as caught:
        load_params(path, overrides)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 500
    return message
