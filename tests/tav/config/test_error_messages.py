"""Mistakes in params.yaml: the line that describes each."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from tav.config import DecodeParams
from tav.config.error_messages import describe_option_errors
from tests.support.params import SHORT, refusal

ATTENTION = "must be a list of 1 to 6 items, each one of first, former, self, middle, next, all"


INSIDE = "must be a relative path inside the project, without '..'"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tune: {}", "tune: {steps: -1}", "tune.steps: -1 is not allowed: must be a whole number between 0 and 100000"),
        ("tune: {}", "tune: {steps: true}", "tune.steps: True is not allowed: must be a whole number"),
        ("tune: {}", "tune: {steps: 1e3}", "tune.steps: 1000.0 is not allowed: must be a whole number"),
        ("tune: {}", "tune: {steps: '3'}", "tune.steps: '3' is not allowed: must be a whole number"),
        (
            "tune: {}",
            "tune: {learning_rate: 0}",
            "tune.learning_rate: 0 is not allowed: must be a number greater than 0",
        ),
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
        ("tune: {}", "tune: {precision: half}", "must be one of auto, float32, bfloat16, float16"),
        (
            "tune: {}",
            "tune: {trainable: [1]}",
            "tune.trainable.0: 1 is not allowed: must be a list of 1 or more items, each",
        ),
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
        (
            "score: {}",
            "score: {}\nruntime: {device: gpu}",
            "must be auto; or cpu, mps, cuda or cuda:NUMBER, or a list of these",
        ),
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
        (
            ", decode: {}}",
            ", decode: 3}",
            "clips.ball.decode: 3 is not allowed: must be a mapping with the keys frames, width",
        ),
        (
            "decode: {start: 3",
            "tune: {step: 3",
            "clips.car.tune.step: unknown key; did you mean steps? (allowed: steps, learn",
        ),
        (
            "decode: {start: 3",
            "edit: {steps: 0}, decode: {start: 3",
            "clips.car.edit.steps: 0 is not allowed: must be a whole number between 1",
        ),
        (
            "decode: {start: 3",
            "tuned: {steps: 3",
            "clips.car.tuned: unknown key; did you mean tune? (allowed: video, caption",
        ),
        ("decode: {}}", "seed: -1}", "clips.ball.seed: -1 is not allowed: must be a whole number"),
        ("decode: {}}", "base_model: ../x}", f"clips.ball.base_model: '../x' is not allowed: {INSIDE}"),
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


def test_all_mistakes_of_options_by_their_names() -> None:
    with pytest.raises(ValidationError) as caught:
        DecodeParams.model_validate({"width": 60, "height": 64.5, "frames": "some", "end": 0})
    side = "must be a whole number between 64 and 4096, a multiple of 8"
    assert describe_option_errors(caught.value, DecodeParams, {"width": "--size", "height": "--size"}) == (
        "--frames: 'some' is not allowed: must be a whole number between 1 and 100000, or all; "
        f"--size: width: 60 is not allowed: {side}; height: 64.5 is not allowed: {side}; "
        "--end: 0 is not allowed: must be a whole number at least 1 or null"
    )


def test_no_clips(path: Path) -> None:
    for clips in ("{}", "[]", "null", "ball"):
        path.write_text(SHORT.partition("clips:")[0] + f"clips: {clips}\n")
        assert "is not allowed: must be a mapping from names to one or more clips" in refusal(path)
