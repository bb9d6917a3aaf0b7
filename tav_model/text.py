"""Prompts as the text encoder's embeddings."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tav_model.errors import TavError

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

logger = logging.getLogger(__name__)


@torch.no_grad()
def encode_prompts(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, prompts: Sequence[str]) -> torch.Tensor:
    """`b n c` text embeddings, padded to the length that the encoder knows (77 in CLIP).

    What lies beyond that length cannot be seen by the model; it is cut off, and a warning says what was.

    Raises:
        TavError: the tokenizer has words that the encoder does not know.
    """
    # The files of some tokenizers do not say how long the encoder's input may be.
    limit = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
    for prompt in prompts:
        ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
        if len(ids) > limit:
            lost = tokenizer.decode(ids[limit - 1 : -1])
            logger.warning("the prompt has more than %d tokens; not seen by the model: %r", limit, lost)
    tokens = tokenizer(list(prompts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
    known = text_encoder.config.vocab_size
    if int(tokens.input_ids.max()) >= known:
        raise TavError(
            f"the tokenizer is not the text encoder's: it has {len(tokenizer)} words, the encoder knows {known}"
        )
    use_mask = getattr(text_encoder.config, "use_attention_mask", False)
    mask = tokens.attention_mask.to(text_encoder.device) if use_mask else None
    return text_encoder(tokens.input_ids.to(text_encoder.device), attention_mask=mask).last_hidden_state
