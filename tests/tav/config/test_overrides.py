"""Overrides: from a command line, and applied to the parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tav.config import (
    EditParams,
    RuntimeParams,
    TuneParams,
    load_params,
    overrides_of_clips,
    parse_overrides,
    write_overrides,
)
from tav_model.errors import TavError
from tests.support.params import SHORT


def test_own_settings_of_clips() -> None:
    given = {"tune.steps": "3", "seed": "7", "runtime.device": "cpu", "clips.car.caption": "a"}
    assert overrides_of_clips(given, ["ball", "car"]) == {
        "clips.ball.tune.steps": "3",
        "clips.car.tune.steps": "3",
        "clips.ball.seed": "7",
        "clips.car.seed": "7",
        "runtime.device": "cpu",
        "clips.car.caption": "a",
    }


def test_own_settings_that_are_the_common_ones_are_not_kept(path: Path) -> None:
    path.write_text(SHORT.replace("tune: {}", "tune: {steps: 400, learning_rate: 3.0e-5}"))
    same = {
        "clips.ball.tune.steps": "400",
        "clips.ball.base_model": "models/small",
        "clips.ball.tune.learning_rate": 3e-5,
    }
    before = path.read_text()
    write_overrides(path, same)
    assert path.read_text() == before
    own = {
        "clips.ball.tune.steps": 300,
        "clips.ball.base_model": "models/large",
        "clips.ball.attention.temporal": "false",
    }
    ball = write_overrides(path, own).for_clip("ball")
    assert (ball.tune.steps, ball.base_model, ball.attention.temporal) == (300, "models/large", False)
    assert load_params(path).for_clip("car").tune.steps == 400
    params = write_overrides(path, same)
    assert params.for_clip("ball").tune == params.tune and params.clips["ball"].base_model is None
    assert not params.clips["ball"].tune.model_fields_set
    # In whichever order they come, the clip's is compared with the new common one.
    both = {"clips.ball.tune.steps": 5, "tune.steps": 5}
    assert not write_overrides(path, both).clips["ball"].tune.model_fields_set


def test_changes_of_a_command_line() -> None:
    assert parse_overrides(["tune.steps=3", " a.b = c=d "]) == {"tune.steps": "3", "a.b": "c=d"}
    for text in ("tune.steps", "=3", " =3"):
        with pytest.raises(TavError, match=r"--set: .* is not allowed: must be KEY=VALUE"):
            parse_overrides([text])


@pytest.mark.parametrize(
    ("overrides", "read"),
    [
        ({"tune.steps": 10}, lambda params: params.tune.steps == 10),
        ({"tune.steps": "10"}, lambda params: params.tune.steps == 10),
        ({"tune.learning_rate": "1e-4"}, lambda params: params.tune.learning_rate == 1e-4),
        ({"attention.temporal": "false"}, lambda params: params.attention.temporal is False),
        ({"attention.spatial": ["self"]}, lambda params: params.attention.spatial == ["self"]),
        ({"attention.spatial": "[self, all]"}, lambda params: params.attention.spatial == ["self", "all"]),
        ({"tune": {"steps": 3}}, lambda params: params.tune == TuneParams(steps=3)),
        ({"tune": "{steps: 3}"}, lambda params: params.tune == TuneParams(steps=3)),
        ({"edit.start": "random", "edit.steps": 7}, lambda params: params.edit == EditParams(start="random", steps=7)),
        ({"runtime.device": "cpu"}, lambda params: params.runtime == RuntimeParams(device="cpu")),
        ({"decode.end": "null"}, lambda params: params.decode.end is None),
        ({"decode.end": "9"}, lambda params: params.decode.end == 9),
        ({"score.clip_model": "null"}, lambda params: params.score.clip_model is None),
        ({"score.clip_model": "a/b"}, lambda params: params.score.clip_model == "a/b"),
        ({"invert.prompt": "null"}, lambda params: params.invert.prompt == "null"),
        ({"invert.prompt": "7"}, lambda params: params.invert.prompt == "7"),
        ({"clips.ball.caption": "a: b"}, lambda params: params.clips["ball"].caption == "a: b"),
        ({"clips.ball.prompts": "data/x.csv"}, lambda params: params.clips["ball"].prompts == "data/x.csv"),
        ({"clips.ball.decode.start": 5}, lambda params: params.for_clip("ball").decode.start == 5),
        ({"clips.car.decode": "{}"}, lambda params: params.for_clip("car").decode == params.decode),
    ],
)
def test_overrides(path: Path, overrides: dict[str, Any], read: Any) -> None:
    assert read(load_params(path, overrides))
    assert path.read_text() == SHORT
    assert read(write_overrides(path, overrides))
    assert read(load_params(path))
