"""Names by which runs can be told apart."""

from tav.tracking.run_names import distinct_name, pipeline_name, tells, with_settings

PARAMS = {"attention.spatial": "first,former", "attention.temporal": "True", "tune.steps": "300", "seed": "33"}
CANNY = PARAMS | {"control.0.kind": "canny", "control.0.scale": "1.0", "control.0.end": "1.0"}


def test_a_name_shows_the_attention_and_the_tuning():
    assert pipeline_name("ball", PARAMS) == "ball · first,former · 300 steps"
    assert (
        pipeline_name("ball", PARAMS | {"attention.temporal": "False"})
        == "ball · first,former · no temporal · 300 steps"
    )
    assert pipeline_name("ball", {}) == "ball"


def test_settings_have_their_keys_and_the_name_has_room_for_three():
    assert with_settings("ball", {"tune.steps": "9", "edit.steps": "10", "invert.steps": "10"}) == (
        "ball · edit.steps 10 · invert.steps 10"
    )
    assert with_settings("ball · self · 9 steps", {"seed": "1"}) == "ball · seed 1 · self · 9 steps"
    many = {f"edit.{letter}": "1" for letter in "abcd"}
    assert with_settings("ball", many) == "ball · edit.a 1 · edit.b 1 · edit.c 1 · …"
    assert len(with_settings("", {"edit.negative_prompt": "x" * 99})) < 50


def test_a_taken_name_is_made_longer():
    others = {"ball": PARAMS, "ball · seed 34": PARAMS | {"seed": "34"}}
    assert distinct_name("fish", PARAMS, others) == "fish"
    assert distinct_name("ball", PARAMS | {"seed": "35"}, others) == "ball · seed 35"
    assert distinct_name("ball", PARAMS | {"seed": "34"}, others) == "ball · seed 34 (2)"


def test_control_is_in_every_name_of_a_run_that_has_it():
    name = pipeline_name("ball", CANNY)
    assert name == "ball · canny control · first,former · 300 steps"
    assert distinct_name(name, CANNY, {pipeline_name("ball", PARAMS): PARAMS}) == name
    assert with_settings(name, {"control.0.kind": "canny", "seed": "1"}) == (
        "ball · seed 1 · canny control · first,former · 300 steps"
    )
    two = CANNY | {"control.1.kind": "depth"}
    assert pipeline_name("ball", two) == "ball · canny,depth control · first,former · 300 steps"


def test_names_tell_apart_runs_whose_control_differs_in_its_settings():
    name = pipeline_name("ball", CANNY)
    assert distinct_name(name, CANNY | {"control.0.scale": "0.5"}, {name: CANNY}) == (
        "ball · control.0.scale 0.5 · canny control · first,former · 300 steps"
    )


def test_what_a_name_tells():
    unsteady = CANNY | {"attention.temporal": "False"}
    name = with_settings(pipeline_name("ball", unsteady), {"seed": "33"})
    for key in ("control", "attention.spatial", "attention.temporal", "tune.steps", "seed"):
        assert tells(name, key, unsteady)
    assert not tells(name, "seed", unsteady | {"seed": "3"})
    assert not tells(name, "control.0.scale", unsteady)
    # Names that earlier versions or users have given.
    assert not tells("ball · first,former · 300 steps", "control", CANNY)
    assert not tells("my favourite", "tune.steps", PARAMS)
