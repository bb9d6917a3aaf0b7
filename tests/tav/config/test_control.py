"""Control networks in params.yaml: what is allowed, for all clips or for one, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tav.config import load_params, write_overrides
from tav.config.control import check_control, own_control_network
from tav.config.dotted_keys import flatten
from tav_model.errors import TavError
from tests.support.models import controlnet, small_base
from tests.support.params import SHORT, refusal

CANNY = {"kind": "canny", "model": "models/canny"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "params.yaml").write_text(SHORT)
    return tmp_path / "params.yaml"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project's folder with a base model, its own network for edges, and others."""
    folder = tmp_path_factory.mktemp("models")
    fitting = controlnet(conditioning_embedding_out_channels=(4, 8, 8, 8))
    small_base(folder / "models/small")
    fitting.save_pretrained(folder / "models/small/controlnet/edges")
    fitting.save_pretrained(folder / "models/canny")
    wide = {"block_out_channels": (16, 16), "conditioning_embedding_out_channels": (4, 8, 8, 8)}
    controlnet(**wide).save_pretrained(folder / "models/wide")
    controlnet().save_pretrained(folder / "models/coarse")
    (folder / "models/empty").mkdir()
    return folder


def test_a_clip_may_have_another_control_or_none(path: Path) -> None:
    params = load_params(path, {"control": [CANNY], "clips.ball.control": [], "clips.car.seed": 5})
    assert [one.kind for one in params.for_clip("car").control] == ["canny"]
    assert params.for_clip("ball").control == []
    (one,) = params.control
    assert (one.scale, one.start, one.end, one.stages) == (1.0, 0.0, 1.0, ["invert", "edit"])
    assert flatten(params.model_dump())["control.0.model"] == "models/canny"


def test_control_is_written_from_a_command_line(path: Path) -> None:
    text = "[{kind: canny, model: models/canny, scale: 0.5}]"
    params = write_overrides(path, {"clips.ball.control": text})
    assert params.for_clip("ball").control[0].scale == 0.5 and params.control == []
    assert f"control: {text}" in path.read_text()
    assert write_overrides(path, {"clips.ball.control": "null"}).for_clip("ball").control == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "edges"}, r"control.0.kind: 'edges' is not allowed: must be one of canny, lineart, depth, pose"),
        ({"scale": 3}, r"control.0.scale: 3 is not allowed: must be a number between 0 and 2"),
        ({"start": 0.6, "end": 0.5}, r"control.0: start: 0.6 must be less than end, which is 0.5"),
        ({"strength": 1}, r"control.0.strength: unknown key.*allowed: kind, model, scale"),
        ({"model": "../elsewhere"}, r"control.0.model: '../elsewhere' is not allowed: must be a relative path"),
        ({"model": None}, r"control.0.model: None is not allowed"),
        ({"kind": "given"}, r"control.0: kind given and a path in given belong together"),
        ({"given": "data/x.mp4"}, r"control.0: .*kind given and a path in given belong together"),
        (
            {"annotator": "models/depth"},
            r"control.0: .*annotator: kind canny needs none; only depth, pose, segmentation",
        ),
        ({"kind": "pose"}, r"control.0: .*annotator: kind pose needs a model"),
        ({"detector": "models/detr"}, r"control.0: .*detector: only kind pose has one"),
        ({"stages": []}, r"control.0.stages: \[\] is not allowed: must be a list of 1 to 3 items"),
        ({"stages": ["score"]}, r"control.0.stages.0: 'score' is not allowed: must be a list of 1 to 3 items"),
    ],
)
def test_what_is_not_allowed_is_named(path: Path, changes: dict[str, Any], message: str) -> None:
    import re

    control = [{key: value for key, value in (CANNY | changes).items() if value is not None or key != "scale"}]
    said = refusal(path, {"control": control})
    assert re.search(rf"params.yaml: {message}", said), said


def test_a_mapping_in_place_of_a_list_and_mixed_guess_modes_are_refused(path: Path) -> None:
    said = refusal(path, {"clips.ball.control": CANNY})
    assert said.endswith("is not allowed: must be a list of mappings, such as [{kind: canny, model: PATH}]")
    said = refusal(path, {"control": [CANNY, CANNY | {"guess_mode": True}]})
    assert said.endswith("guess_mode: must be the same for all networks")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        (
            {"model": "models/wide"},
            r"control.0.model: .*models/wide: the control network was made for another base model",
        ),
        ({"model": "models/coarse"}, r"control.0.model: .*its pixels for each of the latents is 2, not 8"),
        ({"model": "models/empty"}, r"control.0.model: .*models/empty: no control network"),
        ({"model": "models/none"}, r"control.0.model: no model 'models/none': it is neither a folder"),
        ({"source": "cat"}, r"control.0.source: no clip named 'cat'; there are: ball, car"),
        ({"kind": "given", "given": "data/none.mp4"}, r"control.0.given: data/none.mp4: no such file"),
        ({"kind": "depth"}, r"control.0.annotator: is missing; depth needs a model, .*the clip ball has no scene file"),
        ({"kind": "depth", "annotator": "models/none"}, r"control.0: no model 'models/none'"),
    ],
)
def test_what_is_named_must_be_there_and_fit(models: Path, path: Path, changes: dict, message: str | None) -> None:
    params = load_params(path, {"clips.ball.control": [CANNY | changes]})
    check_control(models, "car", params)
    if message is None:
        check_control(models, "ball", params)
        return
    with pytest.raises(TavError, match=rf"\Aparams.yaml: clips.ball.{message}") as error:
        check_control(models, "ball", params)
    assert "\n" not in str(error.value)


def test_a_base_model_may_come_with_networks_of_its_own(models: Path) -> None:
    assert own_control_network(models, "models/small", "canny") == "models/small/controlnet/edges"
    assert own_control_network(models, "models/small", "depth") is None
    assert own_control_network(models, "owner/name", "canny") is None
