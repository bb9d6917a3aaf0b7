"""Build a tokenizer in CLIP's format in which every word of the vocabulary is one token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from tav_model.files import write_json

BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def byte_pairs(words: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return a byte pair encoding (Sennrich et al., arXiv 1508.07909) as in CLIP, with one token for each of `words`.

    The vocabulary starts with every byte, within a word and at its end, so that any text can be encoded. The merges
    follow in order, then the two special tokens.

    Returns:
        The vocabulary (token to id), and the merges, first to last.
    """
    alphabet = _byte_characters()
    spelt = [[*word[:-1], f"{word[-1]}</w>"] for word in sorted(set(words))]
    merges = []
    while pairs := Counter(pair for word in spelt for pair in pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelt = [_merge(word, best) for word in spelt]
    tokens = [*alphabet, *(f"{c}</w>" for c in alphabet), *("".join(pair) for pair in merges), BEGIN, END]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    i = 0
    while i < len(word):
        width = 2 if tuple(word[i : i + 2]) == pair else 1
        merged.append("".join(word[i : i + width]))
        i += width
    return merged


def _byte_characters() -> list[str]:
    """Return a printable character for each byte, in the order of CLIP's vocabulary: printable bytes come first."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]


def write_tokenizer(
    folder: Path, vocabulary: dict[str, int], merges: list[tuple[str, str]], pad: str, max_tokens: int
) -> None:
    """Write the files of a `CLIPTokenizer` to a folder.

    Args:
        folder: created if missing.
        vocabulary: token to id.
        merges: pairs of tokens, first to last.
        pad: token that fills prompts up to `max_tokens`.
        max_tokens: length of a padded prompt, including the two special tokens.
    """
    folder.mkdir(exist_ok=True)
    special = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": pad}
    write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(folder / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_tokens, "do_lower_case": True, **special}
    write_json(folder / "tokenizer_config.json", settings)
