"""Byte pair encoding: one token for each word of the vocabulary, any other text in bytes."""

from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from toyworld.tokenizer import END, byte_pairs, write_tokenizer


@given(words=st.lists(st.text("abc", min_size=1, max_size=8), max_size=8))
def test_byte_pairs_merge_each_word_into_one_token_of_the_vocabulary(words: list[str]):
    vocabulary, merges = byte_pairs(words)
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert {f"{word}</w>" for word in words} | {"".join(pair) for pair in merges} <= set(vocabulary)
    assert byte_pairs(reversed(words)) == (vocabulary, merges)


def test_each_word_is_one_token(tmp_path):
    words = ["bouncing", "a", "ball", "the", "theatre"]
    write_tokenizer(tmp_path / "tokenizer", *byte_pairs(words), END, 77)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert [len(tokenizer(word).input_ids) for word in words] == [3] * len(words)
    assert len(tokenizer("bounced").input_ids) > 3
