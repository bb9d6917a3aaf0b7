"""Captions say what is in the scene, and nothing of what is not."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.toyworld.test_scenes import scenes
from toyworld.captions import caption, described, partial_caption, phrase, random_caption, vocabulary
from toyworld.scenes import ATTRIBUTES, COLOURS, OBJECTS, Scene


def words(text: str) -> list[str]:
    return text.replace(",", "").split()


def test_the_plain_wording():
    assert caption(Scene()) == "a red ball is bouncing on the grass"
    scene = Scene("fish", "orange", "sea", "night", "cartoon", "rolling")
    assert caption(scene) == "a cartoon of an orange fish rolling on the sea at night"


@given(scenes(), st.integers(0, 2**32))
def test_every_wording_names_object_and_colour_once_and_no_other(scene: Scene, seed: int):
    for text in (caption(scene), random_caption(scene, np.random.default_rng(seed))):
        said = words(text)
        assert [word for word in said if word in OBJECTS] == [scene.object]
        assert [word for word in said if word in COLOURS] == [scene.colour]
        assert set(said) <= vocabulary()
        assert "  " not in text and text == text.strip()


@given(scenes())
def test_scenes_that_look_different_are_told_apart(scene: Scene):
    for name, values in ATTRIBUTES.items():
        assert len({caption(scene.edited(**{name: value})) for value in values}) == len(values)
        assert len({phrase(name, value) for value in values}) == len(values)


@given(scenes(), st.integers(0, 2**32))
def test_a_partial_caption_says_what_it_claims(scene: Scene, seed: int):
    text, said = partial_caption(scene, np.random.default_rng(seed))
    assert said and said.items() <= described(scene).items()
    assert set(words(text)) <= vocabulary()
    for name, names in (("object", OBJECTS), ("colour", COLOURS)):
        assert [word for word in words(text) if word in names] == ([said[name]] if name in said else [])


def test_there_are_many_wordings():
    rng = np.random.default_rng(0)
    assert len({random_caption(Scene(sky="night", style="cartoon"), rng) for _ in range(500)}) > 150
