"""Embeddings of prompts by the text encoder."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tav_model.errors import TavError

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

logger = logging.getLogger(__name__)


@torch.no_grad()
def encode_prompts(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, prompts: Sequence[str]) -> torch.Tensor:
    """Return the embeddings `b n c` of b prompts, padded to the length that the encoder supports (77 tokens in CLIP).

    The rest of a longer prompt is cut off, and logged as a warning.

    Raises:
        TavError: the tokenizer has tokens that the encoder does not have.
    """
    # The files of some tokenizers do not limit the length.
    limit = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
    prompts = [expand_tokens(tokenizer, prompt) for prompt in prompts]
    for prompt in prompts:
        ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
        if len(ids) > limit:
            cut_off = tokenizer.decode(ids[limit - 1 : -1])
            logger.warning("the prompt has more than %d tokens; not seen by the model: %r", limit, cut_off)
    tokens = tokenizer(prompts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
    known = text_encoder.config.vocab_size
    if int(tokens.input_ids.max()) >= known:
        raise TavError(
            f"the tokenizer is not the text encoder's: it has {len(tokenizer)} words, the encoder knows {known}"
        )
    use_mask = getattr(text_encoder.config, "use_attention_mask", False)
    mask = tokens.attention_mask.to(text_encoder.device) if use_mask else None
    return text_encoder(tokens.input_ids.to(text_encoder.device), attention_mask=mask).last_hidden_state


def expand_tokens(tokenizer: CLIPTokenizer, prompt: str) -> str:
    """Return a prompt in which tokens of several vectors are written out: `<cat>` becomes `<cat> <cat>_1 <cat>_2`.

    Such tokens come from textual inversion (arXiv 2208.01618), with names as in diffusers. Other tokenizers have none.
    """
    added = tokenizer.get_added_vocab()
    for token in added:
        if f"{token}_1" in added and token in prompt:
            count = next(i for i in range(1, len(added) + 1) if f"{token}_{i}" not in added)
            written = " ".join([token, *(f"{token}_{i}" for i in range(1, count))])
            prompt = written.join(re.split(rf"(?<!\w){re.escape(token)}(?!\w)", prompt))
    return prompt
