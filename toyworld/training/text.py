"""The tokenizer and the shape of the text encoder, which the denoiser and the scorer share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tav_model.files import write_json
from tav_model.vocabulary import FILE
from toyworld.captions import vocabulary, vocabulary_record
from toyworld.tokenizer import BEGIN, END, byte_pairs, write_tokenizer

# Longer than any caption of the world, and shorter than CLIP's 77, which would slow down every attention.
MAX_TOKENS = 32
WIDTH = 128


def text_config() -> dict[str, Any]:
    """Return the arguments of the `CLIPTextConfig` of both."""
    tokens, _ = byte_pairs(vocabulary())
    return {
        "vocab_size": len(tokens),
        "max_position_embeddings": MAX_TOKENS,
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "projection_dim": 64,
        "hidden_act": "quick_gelu",
        "bos_token_id": tokens[BEGIN],
        "eos_token_id": tokens[END],
        "pad_token_id": tokens[END],
    }


def save_tokenizer(folder: Path) -> None:
    """Write the tokenizer of the world's vocabulary to a folder."""
    write_tokenizer(folder, *byte_pairs(vocabulary()), END, MAX_TOKENS)


def save_vocabulary(base: Path) -> None:
    """Write the words that the base model knows next to its parts, so that prompts with others cause a warning."""
    write_json(base / FILE, vocabulary_record())


class Tokens:
    """Turns captions into token ids, with a cache of words: the tokenizer itself is slow in a training loop.

    Args:
        folder: folder of a tokenizer that `save_tokenizer` wrote.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import CLIPTokenizer

        self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        self.known: dict[str, list[int]] = {}

    def __call__(self, captions: list[str]) -> torch.Tensor:
        """Return padded token ids with shape (b, 32)."""
        rows = [[i for word in caption.replace(",", " ,").split() for i in self._ids(word)] for caption in captions]
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        padded = torch.full((len(rows), MAX_TOKENS), end)
        for row, ids in zip(padded, rows, strict=True):
            ids = [begin, *ids[: MAX_TOKENS - 2]]
            row[: len(ids)] = torch.tensor(ids)
        return padded

    def _ids(self, word: str) -> list[int]:
        if word not in self.known:
            self.known[word] = self.tokenizer(word).input_ids[1:-1]
        return self.known[word]
