"""A clip's own settings replace the common ones, also in what DVC has recorded."""

from __future__ import annotations

from typing import Any

import pytest

from tav.config.clip_settings import effective_settings, no_own_settings, with_own_settings


@pytest.mark.parametrize(
    ("common", "own", "effective"),
    [
        ({"steps": 400, "seed": 1}, {"steps": 300}, {"steps": 300, "seed": 1}),
        ({"steps": 400}, {}, {"steps": 400}),
        ({"steps": 400}, None, {"steps": 400}),
        ({"end": 9}, {"end": None}, {"end": None}),
        ({"spatial": ["first", "former"]}, {"spatial": ["self"]}, {"spatial": ["self"]}),
        (33, None, 33),
        (33, 0, 0),
        ("toyworld", "other", "other"),
    ],
)
def test_own_settings_replace_common_ones(common: Any, own: Any, effective: Any) -> None:
    assert with_own_settings(common, own) == effective


def test_effective_settings_of_what_dvc_watches() -> None:
    common = {"seed": 33, "tune": {"steps": 400}, "clips.ball.caption": "a ball"}
    assert effective_settings(common) == common
    nothing = {f"clips.ball.{name}": no_own_settings()[name] for name in ("seed", "tune")}
    assert effective_settings({**common, **nothing}) == common
    # The order in which DVC lists keys makes no difference.
    own = {"clips.ball.tune": {"steps": 300}, "clips.ball.seed": 7}
    assert effective_settings({**own, **common}) == {**common, "seed": 7, "tune": {"steps": 300}}
    assert common == {"seed": 33, "tune": {"steps": 400}, "clips.ball.caption": "a ball"}
