"""Prompts to embeddings: one sequence per prompt, padded; what is too long is named."""

import logging

import pytest
import torch

from tav_model.text import encode_prompts
from tests.support.models import CONTEXT_DIM, text_encoder, tokenizer


def test_embeddings_are_the_text_encoders():
    ids = [52, *(ord(letter) - ord("a") for letter in "ski"), 53]
    ids[3] += 26  # The last letter of a word is another token.
    padded = torch.tensor([ids + [53] * (10 - len(ids))])
    model = text_encoder()
    with torch.no_grad():
        expected = model(padded).last_hidden_state
    ours = encode_prompts(tokenizer(), model, ["ski"])
    assert ours.shape == (1, 10, CONTEXT_DIM)
    torch.testing.assert_close(ours, expected)
    assert not ours.requires_grad


def test_prompts_of_a_list_are_those_of_one():
    prompts = ["a man", "", "snow"]
    together = encode_prompts(tokenizer(), text_encoder(), prompts)
    alone = torch.cat([encode_prompts(tokenizer(), text_encoder(), [prompt]) for prompt in prompts])
    torch.testing.assert_close(together, alone)


def test_prompt_that_fits_warns_of_nothing(caplog):
    encode_prompts(tokenizer(), text_encoder(), ["a man ski"])  # Eight letters and the two ends.
    assert caplog.records == []


def test_prompt_that_is_too_long_is_cut_and_the_warning_says_what(caplog):
    model = text_encoder()
    with caplog.at_level(logging.WARNING):
        cut = encode_prompts(tokenizer(), model, ["a man skis down"])
    (record,) = caplog.records
    assert "10 tokens" in record.message
    assert record.message.rstrip("' ").endswith("down")
    assert "skis" not in record.message
    # "a man skis" has eight letters but the last, which is cut with the word after it.
    torch.testing.assert_close(cut[:, :9], encode_prompts(tokenizer(), model, ["a man skis down"])[:, :9])


def test_only_the_prompt_that_is_too_long_is_named(caplog):
    encode_prompts(tokenizer(), text_encoder(), ["a man", "a very long prompt"])
    assert len(caplog.records) == 1


def test_prompt_of_any_length_has_the_models_length():
    assert encode_prompts(tokenizer(), text_encoder(), ["word " * 100]).shape == (1, 10, CONTEXT_DIM)


@pytest.mark.parametrize("prompt", ["short", "a very long prompt that is cut"])
def test_tokenizer_that_does_not_know_the_models_length(prompt):
    unknown = encode_prompts(tokenizer(max_tokens=None), text_encoder(), [prompt])
    torch.testing.assert_close(unknown, encode_prompts(tokenizer(), text_encoder(), [prompt]))
