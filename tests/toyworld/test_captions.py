"""Captions say what is in the scene, and nothing of what is not."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tav_model.vocabulary import read_vocabulary
from tests.toyworld.test_scenes import scenes
from toyworld import WEIGHTS
from toyworld.captions import caption, described, meanings, partial_caption, phrase, random_caption, vocabulary
from toyworld.scenes import ATTRIBUTES, COLOURS, OBJECTS, Scene, Truth


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


@given(scenes(), st.integers(0, 2**32))
def test_no_caption_is_outside_of_the_vocabulary_that_the_model_declares(scene: Scene, seed: int):
    vocabulary = read_vocabulary(str(WEIGHTS))
    assert vocabulary is not None
    rng = np.random.default_rng(seed)
    texts = [caption(scene), random_caption(scene, rng), partial_caption(scene, rng)[0]]
    assert vocabulary.problems(texts) == ""
    assert vocabulary.problems([f"{texts[0]} on the moon"]) == 'does not know "moon"'
    other = OBJECTS[(OBJECTS.index(scene.object) + 1) % len(OBJECTS)]
    assert (
        vocabulary.problems([f"{texts[0]} on the {other}"]) == f"shows only one object, not {scene.object} and {other}"
    )


def test_words_that_mean_a_value_mean_it_in_every_caption():
    assert meanings()["ground"]["grass"] == ["grass", "lawn", "meadow"]
    assert meanings()["sky"]["night"] == ["dark", "moonlight", "night"]
    assert {attribute: list(values) for attribute, values in meanings().items() if attribute != "motion"} == {
        attribute: list(values) for attribute, values in ATTRIBUTES.items()
    }


def test_there_are_many_wordings():
    rng = np.random.default_rng(0)
    assert len({random_caption(Scene(sky="night", style="cartoon"), rng) for _ in range(500)}) > 150


@given(scenes(), scenes())
def test_the_vocabulary_gives_edits_the_category_of_their_truth(scene: Scene, other: Scene):
    edited = scene.edited(**{name: getattr(other, name) for name in ATTRIBUTES})
    truth, known = Truth(scene, 8, {"edit": edited}), read_vocabulary(str(WEIGHTS))
    assert known is not None
    expected = truth.category("edit") if truth.changes("edit") else None
    assert known.category(caption(scene), caption(edited)) == expected
