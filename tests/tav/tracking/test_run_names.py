"""Names by which runs can be told apart."""

from tav.tracking.run_names import distinct_name, pipeline_name, with_settings

PARAMS = {"attention.spatial": "first,former", "attention.temporal": "True", "tune.steps": "300", "seed": "33"}


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


def test_control_that_the_other_run_lacks_is_named_by_its_kind():
    canny = PARAMS | {"control.0.kind": "canny", "control.0.scale": "1.0", "control.0.end": "1.0"}
    assert distinct_name("ball", canny, {"ball": PARAMS}) == "ball · control.0.kind canny"
    weaker = canny | {"control.0.scale": "0.5"}
    assert distinct_name("ball", weaker, {"ball": canny}) == "ball · control.0.scale 0.5"
