"""Words and their tokens, and how the words of one prompt correspond to those of another."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tav_model.words import changed_words, refinement_matrix, replacement_matrix, token_weights, tokenize
from tests.support.models import tokenizer

LENGTH = 24
TOKENIZER = tokenizer(LENGTH)  # Every letter is a token.
WORD_LISTS = st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=4)


def tokens(prompt, length=LENGTH):
    return tokenize(TOKENIZER, prompt, length)


def word_tokens(prompt):
    return {word.text: word.tokens for word in tokens(prompt).words}


def test_words_have_the_tokens_of_their_letters():
    prompt = tokens("A  red, ball")
    assert [word.text for word in prompt.words] == ["a", "red", "ball"]
    # The comma takes up tokens of its own.
    assert prompt.words[0].tokens == (1,) and prompt.words[1].tokens == (2, 3, 4)
    assert prompt.words[2].tokens == tuple(range(len(prompt.ids) - 5, len(prompt.ids) - 1))


def test_words_beyond_the_length_have_no_tokens():
    prompt = tokens("red ball is", length=6)
    assert [word.tokens for word in prompt.words] == [(1, 2, 3), (4,), ()]


def test_phrase_is_found_wherever_it_occurs():
    prompt = tokens("red ab and red ab")
    assert prompt.tokens_of("red ab") == [1, 2, 3, 4, 5, 9, 10, 11, 12, 13]
    assert prompt.tokens_of("Red") == [1, 2, 3, 9, 10, 11]


@pytest.mark.parametrize("phrase", ["blue", "", "ab red"])
def test_phrase_that_is_not_there_is_refused(phrase):
    with pytest.raises(ValueError, match=rf"'red ab' has no word '{phrase}'"):
        tokens("red ab").tokens_of(phrase)


@pytest.mark.parametrize(
    ("source", "target", "before", "after"),
    [
        ("a red ball", "a blue ball", ["red"], ["blue"]),
        ("a red ball", "a ball", ["red"], []),
        ("a ball", "a red ball", [], ["red"]),
        ("an ox runs", "a cat runs", ["ox"], ["cat"]),
        ("a ball", "the ball", ["a"], ["the"]),
        ("a ball", "a ball", [], []),
    ],
)
def test_changed_words(source, target, before, after):
    expected = [
        [token for word in words for token in word_tokens(prompt)[word]]
        for prompt, words in ((source, before), (target, after))
    ]
    assert list(changed_words(tokens(source), tokens(target))) == expected


@given(words=WORD_LISTS, others=WORD_LISTS)
def test_replacement_loses_no_attention(words, others):
    source, target = tokens(" ".join(words)), tokens(" ".join(others[: len(words)] + words[len(others) :]))
    matrix = replacement_matrix(source, target)
    torch.testing.assert_close(matrix.sum(1), torch.ones(LENGTH))
    for before, after in zip(source.words, target.words, strict=True):
        # Everything that the source's word has goes to the word in its place, in equal parts.
        part = matrix[list(before.tokens)][:, list(after.tokens)]
        assert part.sum().item() == pytest.approx(len(before.tokens))
        if len(before.tokens) != len(after.tokens):
            assert torch.allclose(part, torch.full_like(part, 1 / len(after.tokens)))


@given(words=WORD_LISTS)
def test_a_prompt_corresponds_to_itself(words):
    prompt = tokens(" ".join(words))
    matrix, aligned = refinement_matrix(prompt, prompt)
    assert torch.equal(matrix, torch.eye(LENGTH)) and torch.equal(aligned, torch.ones(LENGTH))
    assert torch.equal(replacement_matrix(prompt, prompt), torch.eye(LENGTH))


@given(words=WORD_LISTS, inserted=st.text("xyz", min_size=1, max_size=3), place=st.integers(0, 4))
def test_refinement_keeps_old_words_and_leaves_new_ones_alone(words, inserted, place):
    source, target = tokens(" ".join(words)), tokens(" ".join([*words[:place], inserted, *words[place:]]))
    matrix, aligned = refinement_matrix(source, target)
    new = [token for word in target.words if word.text == inserted for token in word.tokens]
    assert (aligned == 0).nonzero().flatten().tolist() == new
    old = [i for i in range(len(target.ids)) if i not in new]
    assert matrix[: len(source.ids), old].argmax(0).tolist() == list(range(len(source.ids)))
    torch.testing.assert_close(matrix.sum(0), aligned)


def test_replacement_needs_as_many_words():
    with pytest.raises(ValueError, match=r"replace needs as many words .* use refine"):
        replacement_matrix(tokens("a ball"), tokens("a red ball"))


def test_weights_of_words():
    weights = token_weights(tokens("red ab"), {"ab": 3}, default=0.5)
    assert weights.tolist() == [0.5, 0.5, 0.5, 0.5, 3, 3] + [0.5] * (LENGTH - 6)
