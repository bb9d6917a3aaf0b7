"""Textual inversion: which files are read, and that a new word of one or several vectors works in prompts."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from tav_model import TavError, encode_prompts
from tav_model.personalization.textual_inversion import add_embedding, read_embedding
from tav_model.text import expand_tokens
from tav_model.words import tokenize
from tests.support.models import CONTEXT_DIM, noise, text_encoder, tokenizer

ONE, SEVERAL = noise(CONTEXT_DIM), noise(3, CONTEXT_DIM, seed=1)


@pytest.mark.parametrize(
    ("tensors", "given", "token", "vectors"),
    [
        ({"<cat>": ONE}, None, "<cat>", ONE[None]),
        ({"<cat>": SEVERAL}, None, "<cat>", SEVERAL),
        ({"<cat>": ONE}, "<dog>", "<dog>", ONE[None]),
        ({"emb_params": SEVERAL}, None, "easy-cat", SEVERAL),
        ({"emb_params": SEVERAL, "step": torch.ones(1)}, "mycat", "mycat", SEVERAL),
    ],
)
def test_files_of_diffusers_and_of_the_web_ui(tmp_path, tensors, given, token, vectors):
    save_file(tensors, tmp_path / "easy-cat.safetensors")
    name, read = read_embedding(tmp_path / "easy-cat.safetensors", given)
    assert name == token and torch.equal(read, vectors)


@pytest.mark.parametrize(
    ("tensors", "given", "error"),
    [
        ({"clip_l": ONE, "clip_g": SEVERAL}, None, "of Stable Diffusion XL"),
        ({"a": ONE, "b": SEVERAL}, None, "one tensor of one or several vectors is needed"),
        ({"a": noise(2, 2, CONTEXT_DIM)}, None, "one tensor of one or several vectors is needed"),
        ({"a cat": ONE}, None, "'a cat' cannot be a token: must be one word; choose another"),
        ({"<cat>": ONE}, "a\x07", "cannot be a token"),
        ({"<cat>": ONE * torch.inf}, None, "not finite"),
    ],
)
def test_other_files_are_refused(tmp_path, tensors, given, error):
    save_file(tensors, tmp_path / "cat.safetensors")
    with pytest.raises(TavError, match=error):
        read_embedding(tmp_path / "cat.safetensors", given)


def test_a_word_of_several_vectors_is_written_once_in_prompts():
    words, encoder = tokenizer(), text_encoder()
    before = encode_prompts(words, encoder, ["a dog"])
    add_embedding(words, encoder, "<cat>", SEVERAL)
    assert encoder.config.vocab_size == 57 == len(words)
    assert torch.equal(encoder.get_input_embeddings().weight[54:], SEVERAL)
    ids = words(expand_tokens(words, "a <cat>, a <cat>")).input_ids
    assert [one for one in ids if one >= 54] == [54, 55, 56] * 2
    assert words("a <CAT>").input_ids == words("a <cat_>".replace("_", "").upper()).input_ids  # As it is written only.
    assert torch.equal(encode_prompts(words, encoder, ["a dog"]), before)
    assert not torch.equal(encode_prompts(words, encoder, ["a <cat>"]), encode_prompts(words, encoder, ["a cat"]))


def test_each_vector_is_a_word_where_prompts_are_compared():
    words, encoder = tokenizer(), text_encoder()
    add_embedding(words, encoder, "<cat>", SEVERAL)
    prompt = tokenize(words, "a <cat>", 10)
    assert [word.text for word in prompt.words] == ["a", "<cat>", "<cat>_1", "<cat>_2"]
    assert [word.tokens for word in prompt.words] == [(1,), (2,), (3,), (4,)]


def test_tokens_within_other_words_stay():
    words, encoder = tokenizer(), text_encoder()
    add_embedding(words, encoder, "cat-x", SEVERAL)
    assert expand_tokens(words, "a cat-xy cat-x") == "a cat-xy cat-x cat-x_1 cat-x_2"
    assert 54 not in words("a cat-xy").input_ids


@pytest.mark.parametrize(
    ("token", "vectors", "error"),
    [
        ("<cat>", noise(1, 5), "vectors of 5 numbers, but the base model's words have 12"),
        ("a", ONE[None], "a: the base model has this word already"),
        ("<|endoftext|>", ONE[None], "has this word already"),
    ],
)
def test_what_does_not_fit_the_base_model_is_refused(token, vectors, error):
    words, encoder = tokenizer(), text_encoder()
    with pytest.raises(TavError, match=error):
        add_embedding(words, encoder, token, vectors)
    assert len(words) == 54 == encoder.config.vocab_size
