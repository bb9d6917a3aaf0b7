"""Closed vocabularies: what a model does not know of a prompt, and that nothing is said where nothing is declared."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tav_model.errors import TavError
from tav_model.files import write_json
from tav_model.vocabulary import FILE, Vocabulary, read_vocabulary

RECORD = {
    "summary": "a cat or a dog",
    "documentation": "words.md",
    "attributes": {"animal": {"cat": ["cat", "kitten"], "dog": ["dog"]}, "colour": {"red": ["red"], "blue": ["blue"]}},
    "categories": {"animal": "object", "colour": "colour"},
    "other_words": ["a", "and", "the"],
}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    folder = tmp_path_factory.mktemp("base")
    write_json(folder / FILE, RECORD)
    vocabulary = read_vocabulary(str(folder))
    assert vocabulary is not None
    return vocabulary


@pytest.mark.parametrize(
    ("caption", "prompt", "category"),
    [
        ("a red cat", "a blue cat", "colour"),
        ("a red cat", "the kitten", "colour"),  # Its colour is no longer named.
        ("a red cat", "a red kitten", None),
        ("a red cat", "the red dog", "object"),
        ("a red cat", "a blue dog", "multiple"),
        ("a zebra", "a lion", None),
    ],
)
def test_category_of_an_edit(vocabulary, caption, prompt, category):
    assert vocabulary.category(caption, prompt) == category


def test_without_categories_edits_have_none(tmp_path):
    write_json(tmp_path / FILE, {name: value for name, value in RECORD.items() if name != "categories"})
    plain = read_vocabulary(str(tmp_path))
    assert plain is not None and plain.category("a red cat", "a blue cat") is None


@pytest.mark.parametrize(
    ("texts", "problems"),
    [
        (["a red cat", "the Blue DOG, a dog."], ""),
        (["a kitten, the cat"], ""),
        (["a zebra"], 'does not know "zebra"'),
        (["a zebra, 2 cats", "a zebra and cats"], 'does not know "zebra", "2" or "cats"'),
        (["a cat and a dog"], "shows only one animal, not cat and dog"),
        (["a cat", "a dog"], ""),
        (["the dog and the kitten, red or blue"], 'does not know "or"; shows only one animal, not dog and cat; '
         "shows only one colour, not red and blue"),
    ],
)  # fmt: skip
def test_problems_of_prompts(vocabulary: Vocabulary, texts: list[str], problems: str) -> None:
    assert vocabulary.problems(texts) == problems


@given(words=st.lists(st.sampled_from(["a", "and", "the", "red", "kitten", "cat"])), seed=st.randoms())
def test_known_words_in_any_case_and_punctuation_are_known(
    vocabulary: Vocabulary, words: list[str], seed: object
) -> None:
    text = "".join(seed.choice([word, word.upper()]) + seed.choice([" ", ", ", ". ", "-"]) for word in words)  # type: ignore[attr-defined]
    assert vocabulary.problems([text]) == ""
    assert vocabulary.unknown_words(f"{text} zebra Zebra") == ["zebra"]


def test_a_model_that_declares_nothing_has_no_limits(tmp_path: Path) -> None:
    assert read_vocabulary(str(tmp_path)) is None
    assert read_vocabulary("stable-diffusion-v1-5/stable-diffusion-v1-5") is None


@pytest.mark.parametrize("content", ["[]", "{}", '{"attributes": [], "other_words": []}', "{"])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(TavError, match=FILE):
        read_vocabulary(str(tmp_path))
