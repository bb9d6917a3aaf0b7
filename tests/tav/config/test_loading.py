"""Loading params.yaml: any content is accepted, or refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tav.config import (
    Params,
    load_params,
)
from tav_model.errors import TavError
from tests.support.params import SHORT

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=2),
    max_leaves=4,
)


KEYS = [
    *("seed", "base_model", "attention", "attention.spatial", "attention.temporal", "decode", "decode.end", "tune"),
    *("tune.steps", "tune.learning_rate", "tune.trainable", "invert.prompt", "edit.start", "score.clip_model", "clips"),
    *("tracking.uri", "clips.ball", "clips.ball.decode", "clips.ball.decode.width", "clips.ball.video", "runtime"),
]


@given(key=st.sampled_from(KEYS), value=values)
@settings(max_examples=80)
def test_any_value_is_taken_or_refused_in_one_line(scratch: Path, key: str, value: Any) -> None:
    scratch.write_text(SHORT)
    params, message = None, None
    try:
        params = load_params(scratch, {key: value})
    except TavError as error:
        message = str(error)
    if message is None:
        assert isinstance(params, Params)
    else:
        assert message.startswith("params.yaml: ") and message.isprintable()
        assert key in message or "null" in message


@given(
    text=st.text(max_size=30) | st.text("{}[]:,-&*!|>'\"%@` \n\t#?ab1.e", max_size=30), at=st.integers(0, len(SHORT))
)
@settings(max_examples=80)
def test_any_text_is_read_or_refused_in_one_line(scratch: Path, text: str, at: int) -> None:
    scratch.write_bytes((SHORT[:at] + text + SHORT[at:]).encode(errors="replace"))
    params, message = None, None
    try:
        params = load_params(scratch)
    except TavError as error:
        message = str(error)
    if message is None:
        assert isinstance(params, Params)
    else:
        assert message.startswith("params.yaml: ") and "\n" not in message
