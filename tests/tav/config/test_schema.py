"""params.yaml's schema: defaults, descriptions, and the clips' own settings."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from tav.config import (
    RESULT_SECTIONS,
    ClipParams,
    DecodeParams,
    Params,
    RuntimeParams,
    TuneParams,
    WindowParams,
    load_params,
    no_own_settings,
)
from tav.config.schema import is_section
from tav_model.errors import TavError
from tav_model.windows import WindowOptions
from tests.support.params import SHORT, refusal

ROOT = Path(__file__).resolve().parents[3]


def test_short_file_has_the_settings_of_the_paper(path: Path) -> None:
    params = load_params(path)
    assert (params.base_model, params.seed) == ("models/small", 33)
    assert params.attention.spatial == ["first", "former"] and params.attention.temporal
    assert (params.tune.steps, params.tune.learning_rate, params.tune.weight_decay) == (500, 3e-5, 1e-2)
    assert (params.tune.adam_beta1, params.tune.adam_beta2, params.tune.max_gradient_norm) == (0.9, 0.999, 1.0)
    assert params.tune.trainable == ["attn1.to_q", "attn2.to_q", "attn_temp"]
    assert (params.decode.width, params.decode.height, params.decode.sampling) == (512, 512, "uniform")
    assert (params.invert.steps, params.invert.prompt) == (50, "")
    assert (params.edit.steps, params.edit.guidance_scale, params.edit.start) == (50, 12.5, "inverted")
    assert params.runtime == RuntimeParams() and list(params.clips) == ["ball", "car"]


def test_the_projects_own_file_is_complete() -> None:
    """Every key stands in the file, so that it shows what there is to change."""
    params = load_params(ROOT / "params.yaml")
    for name in Params.model_fields:
        section = getattr(params, name)
        if isinstance(section, BaseModel):
            assert section.model_fields_set == set(type(section).model_fields), name


def test_every_field_is_described() -> None:
    def check(model: type[BaseModel]) -> int:
        count = 0
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                count += check(field.annotation)
            count += 1
        return count

    assert check(Params) + check(ClipParams) > 50


def test_parameters_do_not_change(path: Path) -> None:
    params = load_params(path)
    with pytest.raises(ValueError, match="frozen"):
        params.tune.steps = 3


def test_parameters_of_a_clip(path: Path) -> None:
    params = load_params(path)
    assert params.for_clip("ball") == params
    assert params.for_clip("car").decode == DecodeParams(frames=8, start=3, width=128, end=40)
    own = "seed: 7, attention: {spatial: [self]}, tune: {steps: 3}, score: {clip_model: a/b}, decode: {start: 3"
    path.write_text(SHORT.replace("decode: {start: 3", own))
    params = load_params(path)
    car = params.for_clip("car")
    assert (car.seed, car.base_model) == (7, "models/small")
    assert (car.attention.spatial, car.attention.temporal) == (["self"], True)
    assert car.tune == TuneParams(steps=3) and car.score.clip_model == "a/b"
    assert (car.edit, car.invert, car.encode) == (params.edit, params.invert, params.encode)
    assert car.for_clip("car") == car
    assert params.for_clip("ball") == params


def test_the_sections_of_a_clip_are_those_that_decide_a_result() -> None:
    others = {"video", "caption", "prompts"}
    assert [name for name in ClipParams.model_fields if name not in others] == list(RESULT_SECTIONS)
    assert no_own_settings().keys() == set(RESULT_SECTIONS)
    for name in RESULT_SECTIONS:
        common, own = Params.model_fields[name].annotation, ClipParams.model_fields[name].annotation
        assert not is_section(common) or list(own.model_fields) == list(common.model_fields)


def test_a_clip_can_want_all_of_a_video_that_others_want_part_of(path: Path) -> None:
    path.write_text(SHORT.replace("{frames: 8}", "{frames: 8, end: 20}").replace("end: 40", "end: null"))
    params = load_params(path)
    assert (params.for_clip("ball").decode.end, params.for_clip("car").decode.end) == (20, None)


def test_windows_of_a_clip(path: Path) -> None:
    assert load_params(path).window.options(1000) is None
    path.write_text(SHORT.replace("encode: {}", "encode: {}\nwindow: {context_length: 16}", 1))
    window = load_params(path).for_clip("ball").window
    assert window.options(16) is None
    assert window.options(17) == WindowOptions(16, None, True, "pyramid") and window.options(17).stride == 8
    own = "window: {context_length: 4, context_stride: 3, anchor: false, weighting: uniform}, decode: {start: 3"
    path.write_text(path.read_text().replace("decode: {start: 3", own))
    assert load_params(path).for_clip("car").window.options(5) == WindowOptions(4, 3, False, "uniform")
    path.write_text(SHORT.replace("encode: {}", "encode: {}\nwindow: null", 1))
    assert load_params(path).window == WindowParams()


def test_stride_that_leaves_frames_out(path: Path) -> None:
    message = "context_stride must be at most context_length, which is 4"
    path.write_text(SHORT.replace("encode: {}", "encode: {}\nwindow: {context_length: 4, context_stride: 5}", 1))
    assert message in refusal(path)
    path.write_text(SHORT.replace("encode: {}", "encode: {}\nwindow: {context_length: 16, context_stride: 5}", 1))
    path.write_text(path.read_text().replace("decode: {start: 3", "window: {context_length: 4}, decode: {start: 3"))
    with pytest.raises(TavError, match=f"^params.yaml: clips.car.window: {message}$"):
        load_params(path).for_clip("car")


def test_unknown_clip(path: Path) -> None:
    for ask in (load_params(path).clip, load_params(path).for_clip):
        with pytest.raises(TavError, match=r"^params\.yaml: clips: no clip named 'cat'; there are: ball, car$"):
            ask("cat")
