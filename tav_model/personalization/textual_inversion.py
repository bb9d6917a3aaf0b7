"""Textual inversion (Gal et al., arXiv 2208.01618): learned embeddings as new words of a tokenizer and a text encoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from tav_model.errors import TavError
from tav_model.personalization.weight_files import SDXL, read_weights

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

AUTOMATIC1111 = "emb_params"
"""The name of the tensor in files of AUTOMATIC1111's web UI, which do not name the token."""


def read_embedding(path: Path, token: str | None = None) -> tuple[str, torch.Tensor]:
    """Return the token of a textual inversion and its vectors, `n c`.

    Args:
        path: a safetensors file of diffusers (the token is the name of its tensor) or of AUTOMATIC1111's web UI (the token
            is the name of the file).
        token: what to write in prompts instead.

    Raises:
        TavError: the file is no textual inversion, or the token is no word.
    """
    tensors, _ = read_weights(path)
    if {"clip_l", "clip_g"} & tensors.keys():
        raise TavError(f"{path}: a textual inversion {SDXL}")
    name = AUTOMATIC1111 if AUTOMATIC1111 in tensors else next(iter(tensors))
    vectors = tensors[name]
    if (len(tensors) > 1 and name != AUTOMATIC1111) or vectors.ndim not in (1, 2):
        raise TavError(f"{path}: not a textual inversion: one tensor of one or several vectors is needed")
    word = token or (path.stem if name == AUTOMATIC1111 else name)
    if word.split() != [word] or not word.isprintable():
        raise TavError(f"{path}: {word!r} cannot be a token: must be one word; choose another (FILE:TOKEN)")
    return word, vectors.reshape(-1, vectors.shape[-1])


def add_embedding(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, token: str, vectors: torch.Tensor) -> None:
    """Add a token with its vectors, `n c`: further vectors are tokens of their own, `TOKEN_1`, `TOKEN_2` ..., as in diffusers.

    `tav_model.text.expand_tokens` writes them out in prompts.

    Raises:
        TavError: the vectors are of another text encoder, or there is such a token already.
    """
    from transformers import AddedToken

    embedding = text_encoder.get_input_embeddings()
    if vectors.shape[1] != embedding.embedding_dim:
        raise TavError(
            f"{token}: vectors of {vectors.shape[1]} numbers, but the base model's words have {embedding.embedding_dim}; "
            "a textual inversion of another base model?"
        )
    tokens = [token, *(f"{token}_{i}" for i in range(1, len(vectors)))]
    vocabulary = tokenizer.get_vocab()
    if taken := next((one for one in tokens if one in vocabulary or f"{one.lower()}</w>" in vocabulary), None):
        raise TavError(f"{taken}: the base model has this word already; choose another token (FILE:TOKEN)")
    # Not normalised: a token is found as it is written, before the text is made lower-case.
    tokenizer.add_tokens([AddedToken(one, single_word=True, normalized=False) for one in tokens])
    ids = tokenizer.convert_tokens_to_ids(tokens)
    size = max(embedding.num_embeddings, max(ids) + 1)
    weight = embedding.weight.detach()
    grown = torch.cat([weight, weight.new_zeros(size - len(weight), weight.shape[1])])
    grown[ids] = vectors.to(grown)
    text_encoder.set_input_embeddings(nn.Embedding.from_pretrained(grown))
    text_encoder.config.vocab_size = size
