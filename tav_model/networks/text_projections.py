"""Keys and values of the text, computed once for each prompt instead of in every step of a sampling or an inversion."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from tav_model.compiling import is_compiled

if TYPE_CHECKING:
    from torch import nn

KEPT = 4
"""Texts whose keys and values are kept: batches with and without the source, with and without negative prompts."""
Projections = tuple[torch.Tensor, torch.Tensor]


class TextBatches:
    """Texts concatenated to batches, `b n c`: the same texts make the same tensor, by which its projections are found."""

    def __init__(self) -> None:
        self._known: list[tuple[list[torch.Tensor], torch.Tensor]] = []

    def __call__(self, texts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the texts as one batch."""
        for parts, batch in self._known:
            if len(parts) == len(texts) and all(one is other for one, other in zip(parts, texts, strict=True)):
                return batch
        batch = torch.cat(list(texts))
        self._known = [*self._known, (list(texts), batch)][-KEPT:]
        return batch


class _ProjectedTexts:
    """The keys and values of one layer by text. A text is recognised as an object; its numbers must not change."""

    def __init__(self, project: Callable[[torch.Tensor], Projections]) -> None:
        self.project = project
        self._known: list[tuple[torch.Tensor, Projections]] = []

    def __call__(self, text: torch.Tensor) -> Projections:
        for known, projections in self._known:
            if known is text:
                return projections
        projections = self.project(text)
        self._known = [*self._known, (text, projections)][-KEPT:]
        return projections


@contextlib.contextmanager
def text_projected_once(unet: nn.Module) -> Iterator[None]:
    """Keep the keys and values of texts in the cross-attention of a network until the context ends.

    Where the network gets the same tensor as its text again, they are not computed again. Nothing else changes, not a bit.
    It is for inference: kept values belong to one state of the weights. A compiled network is left as it is, because it would
    be compiled again for every text.
    """
    if is_compiled(unet):
        yield
        return
    from tav_model.networks.transformer import BasicTransformerBlock

    layers = [module.attn2 for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
    for layer in layers:
        layer.project_context = _ProjectedTexts(layer.project_context)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.project_context
