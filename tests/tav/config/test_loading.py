"""params.yaml: what is refused and in which words, overrides, and the paths and models that it names."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from ruamel.yaml import YAML

from tav.config import (
    ClipParams,
    DecodeParams,
    EditParams,
    Params,
    RuntimeParams,
    TuneParams,
    add_clip,
    load_params,
    parse_overrides,
    write_overrides,
)
from tav.config.paths import Project, project_path, resolve_model
from tav_model.errors import TavError
from toyworld import WEIGHTS

ROOT = Path(__file__).resolve().parents[3]

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


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(SHORT)
    return path


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for tests that write it many times."""
    return tmp_path_factory.mktemp("scratch") / "params.yaml"


def refusal(path: Path, overrides: dict[str, Any] | None = None) -> str:
    with pytest.raises(TavError) as caught:
        load_params(path, overrides)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 500
    return message


# What is read


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


@pytest.mark.parametrize("number", ["3e-5", "3E-5", "3.0e-5", "0.00003", "+3e-05", "3.e-5"])
def test_numbers_as_dvc_reads_them(path: Path, number: str) -> None:
    """YAML 1.1, and so PyYAML, takes 3e-5 for a text."""
    from dvc.utils.serialize import load_yaml

    path.write_text(SHORT.replace("tune: {}", f"tune: {{learning_rate: {number}}}"))
    assert load_params(path).tune.learning_rate == 3e-5 == load_yaml(str(path))["tune"]["learning_rate"]


@given(rate=st.floats(1e-300, 1, allow_nan=False), form=st.sampled_from(["{!r}", "{:e}", "{:.17g}", "{:.0e}"]))
@settings(max_examples=40)
def test_any_spelling_of_a_number(scratch: Path, rate: float, form: str) -> None:
    spelt = form.format(rate)
    scratch.write_text(SHORT.replace("tune: {}", f"tune: {{learning_rate: {spelt}}}"))
    if 0 < float(spelt) <= 1:
        assert load_params(scratch).tune.learning_rate == float(spelt)
    else:
        assert "tune.learning_rate" in refusal(scratch)


def test_words_that_yaml_1_1_takes_for_booleans_are_texts(path: Path) -> None:
    path.write_text(SHORT.replace("a ball,", "no,").replace("invert: {}", "invert: {prompt: on}"))
    params = load_params(path)
    assert (params.clips["ball"].caption, params.invert.prompt) == ("no", "on")


def test_decode_of_a_clip(path: Path) -> None:
    params = load_params(path)
    assert params.decode_for("ball") == params.decode
    assert params.decode_for("car") == DecodeParams(frames=8, start=3, width=128, end=40)


def test_a_clip_can_want_all_of_a_video_that_others_want_part_of(path: Path) -> None:
    path.write_text(SHORT.replace("{frames: 8}", "{frames: 8, end: 20}").replace("end: 40", "end: null"))
    params = load_params(path)
    assert (params.decode_for("ball").end, params.decode_for("car").end) == (20, None)


def test_unknown_clip(path: Path) -> None:
    for ask in (load_params(path).clip, load_params(path).decode_for):
        with pytest.raises(TavError, match=r"^params\.yaml: clips: no clip named 'cat'; there are: ball, car$"):
            ask("cat")


# What is refused

ATTENTION = "must be a list of 1 to 6 items, each one of first, former, self, middle, next, all"
INSIDE = "must be a relative path inside the project, without '..'"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tune: {}", "tune: {steps: -1}", "tune.steps: -1 is not allowed: must be a whole number between 0 and 100000"),
        ("tune: {}", "tune: {steps: true}", "tune.steps: True is not allowed: must be a whole number"),
        ("tune: {}", "tune: {steps: 1e3}", "tune.steps: 1000.0 is not allowed: must be a whole number"),
        ("tune: {}", "tune: {steps: '3'}", "tune.steps: '3' is not allowed: must be a whole number"),
        ("tune: {}", "tune: {learning_rate: 0}", "tune.learning_rate: 0 is not allowed: must be a number greater than 0"),
        ("tune: {}", "tune: {learning_rate: .inf}", "tune.learning_rate: inf is not allowed: must be a number greater"),
        ("tune: {}", "tune: {max_gradient_norm: .inf}", "tune.max_gradient_norm: inf is not allowed: must be a number"),
        ("tune: {}", "tune: {max_gradient_norm: .nan}", "tune.max_gradient_norm: nan is not allowed: must be a number"),
        ("tune: {}", "tune: {weight_decay: .nan}", "tune.weight_decay: nan is not allowed: must be a number between"),
        ("tune: {}", f"tune: {{max_gradient_norm: 1{'0' * 400}}}", "tune.max_gradient_norm: 1000"),
        ("tune: {}", f"tune: {{steps: 0x{'f' * 9000}}}", "tune.steps: a value of the type int is not allowed: must be"),
        (
            "tune: {}",
            "tune: {adam_beta2: 1}",
            "tune.adam_beta2: 1 is not allowed: must be a number at least 0 and less",
        ),
        ("tune: {}", "tune: {learning_rate_schedule: cosin}", "must be one of constant, constant_with_warmup, linear"),
        ("tune: {}", "tune: {precision: half}", "must be one of float32, bfloat16, float16"),
        ("tune: {}", "tune: {trainable: [1]}", "tune.trainable.0: 1 is not allowed: must be a list of 1 or more items, each"),
        ("tune: {}", "tune: {stepz: 3}", "tune.stepz: unknown key; did you mean steps? (allowed: steps, learning_rate"),
        ("tune: {}", "tune:", "tune: None is not allowed: must be a mapping with the keys steps, "),
        ("invert: {}", "invert: {steps: 1001}", "1001 is not allowed: must be a whole number between 1 and 1000"),
        (
            "edit: {}",
            "edit: {guidance_scale: 0.5}",
            "edit.guidance_scale: 0.5 is not allowed: must be a number between",
        ),
        ("attention: {}", "attention: {spatial: []}", f"attention.spatial: [] is not allowed: {ATTENTION}"),
        ("attention: {}", "attention: {spatial: [frist]}", f"attention.spatial.0: 'frist' is not allowed: {ATTENTION}"),
        ("attention: {}", "attention: {spatial: first}", f"attention.spatial: 'first' is not allowed: {ATTENTION}"),
        (
            "attention: {}",
            "attention: {temporal: yes}",
            "attention.temporal: 'yes' is not allowed: must be true or fal",
        ),
        ("{frames: 8}", "{width: 130}", "must be a whole number between 64 and 4096, a multiple of 8"),
        ("{frames: 8}", "{end: 0}", "decode.end: 0 is not allowed: must be a whole number at least 1 or null"),
        ("{frames: 8}", "{fit: squeeze}", "decode.fit: 'squeeze' is not allowed: must be one of crop, pad, stretch"),
        ("score: {}", "score: {clip_model: 3}", "score.clip_model: 3 is not allowed: must be a string or null"),
        ("score: {}", "score: {clip_model: /x}", f"score.clip_model: '/x' is not allowed: {INSIDE}"),
        ("score: {}", "score: {}\nruntime: {device: gpu}", "must be auto, cpu, mps, cuda or cuda:NUMBER"),
        ("score: {}", "score: {}\ntracking: {experiment: ''}", "must be a non-empty string"),
        ("seed: 33", "seed: -1", "seed: -1 is not allowed: must be a whole number at least 0 and less than 922337203"),
        ("seed: 33\n", "", "seed: is missing; must be a whole number at least 0"),
        ("seed: 33", "sead: 33", "sead: unknown key; did you mean seed? (allowed: base_model, seed, "),
        ("seed: 33", "seed: 33\n1: 2", "1: unknown key (allowed: base_model, seed, "),
        ("seed: 33", 'seed: 33\n"a\\nb": 2', "'a\\nb': unknown key (allowed: base_model, seed, "),
        ("edit: {}\n", "", "edit: is missing; must be a mapping with the keys steps, guidance_scale"),
        (
            "  ball:",
            "  Ball:",
            "clips.Ball: the clip's name must be 1 to 64 of a-z, 0-9, _ and -, beginning with a lett",
        ),
        ("  ball:", "  -ball:", "clips.-ball: the clip's name must be"),
        ("  ball:", f"  {'b' * 65}:", "the clip's name must be 1 to 64"),
        ("  ball:", "  ../ball:", "the clip's name must be"),
        ("  ball:", "  7:", "clips.7: the clip's name must be"),
        ("a ball,", "' ',", "clips.ball.caption: ' ' is not allowed: must be a string that is not blank"),
        ("a ball,", "[a, ball],", "clips.ball.caption: ['a', 'ball'] is not allowed: must be a string"),
        (", decode: {}}", "}", "clips.ball.decode: is missing; must be a mapping with the keys frames, width"),
        ("start: 3", "start: null", "clips.car.decode.start: None is not allowed: must be a whole number at least 0"),
        ("start: 3", "strat: 3", "clips.car.decode.strat: unknown key; did you mean start?"),
        ("data/car.csv", "../car.csv", f"clips.car.prompts: '../car.csv' is not allowed: {INSIDE}"),
        ("data/car.mp4", "''", f"clips.car.video: '' is not allowed: {INSIDE}"),
        ("models/small", "~/models", f"base_model: '~/models' is not allowed: {INSIDE}"),
    ],
)
def test_mistakes(path: Path, old: str, new: str, message: str) -> None:
    assert old in SHORT
    path.write_text(SHORT.replace(old, new))
    answer = refusal(path)
    assert answer.startswith("params.yaml: ") and message in answer


def test_the_number_of_mistakes(path: Path) -> None:
    path.write_text(SHORT.replace("tune: {}", "tune: {steps: -1, precision: x, adam_beta1: 2}"))
    assert refusal(path).endswith("must be a whole number between 0 and 100000 (and 2 more)")


def test_no_clips(path: Path) -> None:
    for clips in ("{}", "[]", "null", "ball"):
        path.write_text(SHORT.partition("clips:")[0] + f"clips: {clips}\n")
        assert "is not allowed: must be a mapping from names to one or more clips" in refusal(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SHORT.replace("seed: 33", "seed: ["), "line 4, column 1: expected ',' or ']'"),
        (SHORT.replace("seed: 33", "seed: 33\nseed: 34"), 'line 3, column 1: found duplicate key "seed"'),
        (SHORT.replace("{start: 3,", "{start: 3, start: 4,"), 'line 12, column 88: found duplicate key "start"'),
        ("\tseed: 3", "line 1, column 1: found character '\\t'"),
        ("a: *b", "line 1, column 4: found undefined alias 'b'"),
        ("a: !!python/object/apply:os.system ['true']", "line 1, column 4: could not determine a constructor"),
        ("a: 1\n---\nb: 2", "line 2, column 1: but found another document"),
        ("a: \0", "not YAML (unacceptable character"),
        ("a: !!bool x", "not YAML"),
        ("a: !!float", "not YAML"),
        ("a: 2020-13-45", "not YAML (month must be in 1..12)"),
        ("a: " + "[" * 3000, "nested too deeply"),
        ("", "must be a mapping of sections"),
        ("- tune", "must be a mapping of sections"),
    ],
)
def test_what_is_not_yaml(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    answer = refusal(path)
    assert answer.startswith("params.yaml: ") and message in answer


def test_what_cannot_be_read(path: Path, tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent.yaml").endswith("absent.yaml: no such file; run this in the project's folder")
    assert "cannot be read (Is a directory)" in refusal(tmp_path)
    path.write_bytes(SHORT.replace("a ball", "ein Bällchen").encode("latin-1"))
    assert refusal(path).endswith("line 11: not UTF-8")


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
    try:
        params = load_params(scratch, {key: value})
    except TavError as error:
        assert str(error).startswith("params.yaml: ") and str(error).isprintable()
        assert key in str(error) or "null" in str(error)
    else:
        assert isinstance(params, Params)


@given(
    text=st.text(max_size=30) | st.text("{}[]:,-&*!|>'\"%@` \n\t#?ab1.e", max_size=30), at=st.integers(0, len(SHORT))
)
@settings(max_examples=80)
def test_any_text_is_read_or_refused_in_one_line(scratch: Path, text: str, at: int) -> None:
    scratch.write_bytes((SHORT[:at] + text + SHORT[at:]).encode(errors="replace"))
    try:
        load_params(scratch)
    except TavError as error:
        assert str(error).startswith("params.yaml: ") and "\n" not in str(error)


# Overrides


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
        ({"clips.ball.decode.start": 5}, lambda params: params.decode_for("ball").start == 5),
        ({"clips.car.decode": "{}"}, lambda params: params.decode_for("car") == params.decode),
    ],
)
def test_overrides(path: Path, overrides: dict[str, Any], read: Any) -> None:
    assert read(load_params(path, overrides))
    assert path.read_text() == SHORT
    assert read(write_overrides(path, overrides))
    assert read(load_params(path))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"tune.stepz": 1}, "override tune.stepz: unknown key; did you mean steps? (allowed: steps, "),
        ({"tun.steps": 1}, "override tun.steps: unknown key; did you mean tune? (allowed: base_model, seed, "),
        ({"steps": 1}, "override steps: unknown key (allowed: base_model, seed, "),
        ({"seed.first": 1}, "override seed.first: unknown key"),
        ({"attention.spatial.0": "self"}, "override attention.spatial.0: unknown key"),
        ({"": 1}, "override '': unknown key"),
        ({"a\nb": 1}, "override 'a\\nb': unknown key"),
        ({"clips.cat.prompts": "data/x.csv"}, "override clips.cat.prompts: no clip named 'cat'; there are: ball, car"),
        ({"clips.ball.prompt": "data/x.csv"}, "override clips.ball.prompt: unknown key; did you mean prompts?"),
        ({"tune.steps": "many"}, "tune.steps: 'many' is not allowed: must be a whole number between 0 and 100000"),
        ({"tune.steps": "["}, "tune.steps: '[' is not allowed: must be a whole number between 0 and 100000"),
        (
            {"tune.steps": 10, "edit.steps": 0},
            "edit.steps: 0 is not allowed: must be a whole number between 1 and 1000",
        ),
        ({"runtime.edit_batch": True}, "runtime.edit_batch: True is not allowed"),
    ],
)
def test_refused_overrides_leave_the_file(path: Path, overrides: dict[str, Any], message: str) -> None:
    text = SHORT.replace("score: {}", "score: {}\nruntime: {edit_batch: 1}")
    path.write_text(text)
    with pytest.raises(TavError) as caught:
        write_overrides(path, overrides)
    assert message in str(caught.value) and str(caught.value).isprintable()
    assert path.read_text() == text and [file.name for file in path.parent.iterdir()] == ["params.yaml"]


def test_an_override_keeps_everything_else_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    before = (ROOT / "params.yaml").read_text().splitlines()
    path.write_text("\n".join([*before, ""]))
    write_overrides(path, {"tune.steps": 7, "attention.spatial": ["self", "all"], "score.clip_model": None})
    after = path.read_text().splitlines()
    assert len(after) == len(before)
    changed = {old: new for old, new in zip(before, after, strict=True) if old != new}
    assert sorted(new.partition("#")[0].strip() for new in changed.values()) == [
        "clip_model: null",
        "spatial: [self, all]",
        "steps: 7",
    ]
    for old, new in changed.items():
        assert old.partition("#")[2] == new.partition("#")[2]


@pytest.mark.parametrize("text", [SHORT, (ROOT / "params.yaml").read_text(), SHORT.replace("\n", "\r\n")])
def test_values_that_are_there_already_leave_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(text.encode())
    os.utime(path, (1, 1))
    params = load_params(path)
    assert write_overrides(path, {"seed": 33, "decode.frames": 8, "clips.ball.prompts": "data/ball.csv"}) == params
    assert write_overrides(path, {}) == params
    assert path.read_bytes() == text.encode() and path.stat().st_mtime == 1


def test_an_override_leaves_other_writers_of_yaml_alone(path: Path) -> None:
    def written() -> str:
        stream = io.StringIO()
        YAML().dump({"end": None}, stream)
        return stream.getvalue()

    before = written()
    write_overrides(path, {"decode.end": None})
    assert written() == before


def test_an_override_can_repair_a_file(path: Path) -> None:
    path.write_text(SHORT.replace("tune: {}", "tune: {steps: 0}"))
    assert write_overrides(path, {"tune.steps": 5}) == load_params(path)
    assert path.read_text() == SHORT.replace("tune: {}", "tune: {steps: 5}")


def test_line_ends_and_links_stay(tmp_path: Path) -> None:
    file, link = tmp_path / "real.yaml", tmp_path / "params.yaml"
    file.write_bytes(SHORT.replace("\n", "\r\n").encode())
    link.symlink_to(file.name)
    write_overrides(link, {"seed": 34})
    assert link.is_symlink() and file.read_bytes() == SHORT.replace("33", "34").replace("\n", "\r\n").encode()


texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20).filter(str.strip)
changes = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "attention.spatial": st.lists(st.sampled_from(["first", "former", "self", "all"]), min_size=1, max_size=6),
        "tune.learning_rate": st.floats(0, 1, exclude_min=True),
        "tune.steps": st.integers(1, 100000),
        "decode.end": st.none() | st.integers(1, 10**6),
        "invert.prompt": st.just("") | texts,
        "clips.ball.caption": texts
        | st.sampled_from(["yes", "no", "null", "~", "12:30", ":0", "0o7", "1_000", "3e-5", "- a"]),
        "clips.ball.decode.start": st.integers(0, 1000),
        "runtime.gradient_checkpointing": st.booleans(),
    },
)


BLOCK = (
    SHORT.partition("clips:")[0]
    + """\
clips:  # all of them
  # the first
  ball:
    video: data/ball.mp4
    caption: a ball    # that bounces
    prompts: data/ball.csv
    decode: {}

# what follows
"""
)
CAT = {"video": "data/cat.mp4", "caption": "a cat", "prompts": "data/cat.csv", "decode": {"frames": 4}}
CAT_LINES = """\
  cat:
    video: data/cat.mp4
    caption: a cat
    prompts: data/cat.csv
    decode: {frames: 4}
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (BLOCK, "\n# what follows\n"),
        (BLOCK + "runtime: {}\n", "\n# what follows\nruntime: {}\n"),
        (BLOCK.partition("\n\n")[0], ""),
        (BLOCK.partition("\n\n")[0] + "\n  # car: later\n\n", "\n"),
        (BLOCK.partition("\n\n")[0] + "\n...\n", "...\n"),
    ],
)
def test_a_clip_more_is_lines_more(path: Path, before: str, after: str) -> None:
    path.write_text(before)
    text, params = add_clip(path, "cat", CAT)
    kept = before.removesuffix(after)
    assert text == kept + ("" if kept.endswith("\n") else "\n") + CAT_LINES + after
    assert path.read_text() == before
    path.write_text(text)
    assert load_params(path) == params and params.decode_for("cat").frames == 4
    assert list(params.clips) == ["ball", "cat"]


def test_a_clip_more_where_clips_are_in_braces_or_lines_end_otherwise(path: Path) -> None:
    braces = SHORT.partition("clips:")[0] + "clips: {ball: {video: a, caption: a, prompts: a, decode: {}}}  # all\n"
    path.write_text(braces)
    text, params = add_clip(path, "cat", CAT)
    path.write_text(text)
    assert load_params(path) == params and "# a comment" in text and "# all" in text
    path.write_bytes(BLOCK.replace("\n", "\r\n").encode())
    text, _ = add_clip(path, "cat", CAT)
    assert text.count("\r\n") == text.count("\n") == BLOCK.count("\n") + 5


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("ball", {}, "clips: 'ball' already exists"),
        ("Cat", {}, "clips.Cat: the clip's name must be"),
        ("cat", {"video": "/etc/passwd"}, "clips.cat.video: '/etc/passwd' is not allowed"),
        ("cat", {"decode": {"frames": 0}}, "clips.cat.decode.frames: 0 is not allowed"),
        ("cat", {"decode": {"frame": 1}}, "clips.cat.decode.frame: unknown key; did you mean frames?"),
        ("cat", {"caption": " "}, "clips.cat.caption: ' ' is not allowed"),
    ],
)
def test_clips_that_are_refused(path: Path, name: str, change: dict[str, Any], message: str) -> None:
    path.write_text(BLOCK)
    with pytest.raises(TavError) as caught:
        add_clip(path, name, CAT | change)
    assert message in str(caught.value) and str(caught.value).isprintable()


@given(
    caption=texts
    | st.sampled_from(["yes", "null", "~", "12:30", ":0", "- a", "# a", "a: b", "'", '"', "{a}", "|", "a #b"])
)
@settings(max_examples=60)
def test_any_caption_of_a_new_clip_is_read_back(scratch: Path, caption: str) -> None:
    in_braces = SHORT.partition("clips:")[0] + "clips: {ball: {video: a.mp4, caption: a, prompts: a.csv, decode: {}}}\n"
    for before, start, end in (
        (BLOCK, BLOCK.partition("\n\n")[0], "# what follows\n"),
        (in_braces, in_braces[:-2], "}\n"),
    ):
        scratch.write_text(before)
        text, params = add_clip(scratch, "cat", CAT | {"caption": caption})
        scratch.write_text(text)
        assert load_params(scratch) == params and params.clip("cat").caption == caption
        assert text.startswith(start) and text.endswith(end)


def test_changes_of_a_command_line() -> None:
    assert parse_overrides(["tune.steps=3", " a.b = c=d "]) == {"tune.steps": "3", "a.b": "c=d"}
    for text in ("tune.steps", "=3", " =3"):
        with pytest.raises(TavError, match=r"--set: .* is not allowed: must be KEY=VALUE"):
            parse_overrides([text])


@given(overrides=changes)
@settings(max_examples=60)
def test_what_is_written_is_what_was_asked_for(scratch: Path, overrides: dict[str, Any]) -> None:
    scratch.write_text(SHORT)
    asked = load_params(scratch, overrides)
    assert write_overrides(scratch, overrides) == asked == load_params(scratch)
    for key, value in overrides.items():
        place: Any = asked
        for part in key.split("."):
            place = place[part] if isinstance(place, dict) else getattr(place, part)
        assert place == value and type(place) is type(value)
    written = scratch.read_bytes()
    assert b"models/small  # a comment" in written
    write_overrides(scratch, overrides)
    assert scratch.read_bytes() == written


# Paths and models


@pytest.mark.parametrize(
    "text", ["data/x.mp4", "x.csv", "a b/ü.csv", "data/..x", "data/x..", "./data/x", "data//x", "-x"]
)
def test_paths_in_the_project(tmp_path: Path, text: str) -> None:
    assert project_path(tmp_path, text, "here").is_relative_to(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            ".",
            "./",
            "..",
            "../x",
            "data/../x",
            "data/..",
            "/x",
            "//x",
            "~",
            "~/x",
            "~root/x",
            "a\\b",
            "..\\x",
        ),
        *("C:/x", "C:x", "a\0b", "a\nb", "a\x7f", "a\x85b", "a\u2028b", "a\ud800b", "data/" + "x" * 256, "ü" * 128),
    ],
)
def test_paths_out_of_the_project(tmp_path: Path, text: str) -> None:
    with pytest.raises(TavError, match=r"^here: .*must be a relative path inside the project") as caught:
        project_path(tmp_path, text, "here")
    assert str(caught.value).isprintable()


@given(text=st.text(max_size=20) | st.text("./\\~ a", max_size=12))
@settings(max_examples=200)
def test_no_text_leads_out(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    root = tmp_path_factory.getbasetemp() / "project"
    try:
        path = project_path(root, text, "here")
    except TavError:
        return
    assert Path(os.path.abspath(path)).is_relative_to(root) and Path(os.path.abspath(path)) != root
    assert not path.exists()  # and it can be asked for


def test_every_file_of_a_clip_has_a_place_of_its_own(tmp_path: Path) -> None:
    project = Project(tmp_path)
    places = (project.frames, project.latents, project.tuned, project.inverted, project.edits, project.scores)
    paths = [place(clip) for place in (*places, project.contact_sheet, project.report) for clip in ("ball", "car")]
    paths += [project.log(clip, stage) for clip in ("ball", "car") for stage in ("tune", "edit")] + [project.work]
    assert len(set(paths)) == len(paths)
    for path in paths:
        assert not any(path != other and path.is_relative_to(other) for other in paths)
    assert project.frames("ball") == tmp_path / "results/ball/frames"
    assert project.log("ball", "tune") == tmp_path / "logs/ball/tune.log"


def test_models_are_looked_for_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, first, second = tmp_path / "project", tmp_path / "first", tmp_path / "second"
    monkeypatch.setenv("TAV_MODELS", os.pathsep.join([str(first), "", str(second)]))
    name = "someone/diffusion-1.5"
    assert resolve_model(root, name) == name
    for folder in (second, first, root):
        (folder / name).mkdir(parents=True)
        assert resolve_model(root, name) == str(folder / name)
    monkeypatch.delenv("TAV_MODELS")
    assert resolve_model(tmp_path, name) == name


@pytest.mark.parametrize("name", ["toyland", "models/toyland", "a/b/c", "a/-b", "a b/c"])
def test_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("TAV_MODELS", str(tmp_path / "shared"))
    with pytest.raises(TavError) as caught:
        resolve_model(tmp_path / "project", name)
    assert str(tmp_path / "project" / name) in str(caught.value)
    assert str(tmp_path / "shared" / name) in str(caught.value)


def test_the_embedded_model_is_found_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TAV_MODELS", raising=False)
    (tmp_path / "toyworld").mkdir()  # The package of a clone is not the model.
    assert resolve_model(tmp_path, "toyworld") == str(WEIGHTS)
    assert resolve_model(tmp_path, "toyworld/scorer") == str(WEIGHTS / "scorer")
    with pytest.raises(TavError, match="no model 'toyworld/judge'"):
        resolve_model(tmp_path, "toyworld/judge")


def test_a_model_out_of_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAV_MODELS", str(tmp_path / "shared"))
    (tmp_path / "secret").mkdir()
    (tmp_path / "shared").mkdir()
    for name in ("../secret", str(tmp_path / "secret")):
        with pytest.raises(TavError, match="must be a relative path inside the project"):
            resolve_model(tmp_path / "project", name)
