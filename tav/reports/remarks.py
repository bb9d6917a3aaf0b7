"""What is to be said about an edit besides its numbers: words that the base model does not know, and bad scores."""

from __future__ import annotations

from collections.abc import Mapping

from tav.config.metrics import shortcomings
from tav_model.vocabulary import Vocabulary


def edit_remarks(
    prompt: str,
    scores: Mapping[str, float],
    source: Mapping[str, float],
    vocabulary: Vocabulary | None,
    base_model: str,
) -> list[str]:
    """Return remarks on one edit, each a clause; empty if its prompt is known and its scores are as they should be.

    Args:
        prompt: the edit's.
        scores: the edit's, as far as it has any.
        source: the source's scores.
        vocabulary: of the base model; None where any word may be known.
        base_model: its name, as in params.yaml.
    """
    problems = vocabulary.problems([prompt]) if vocabulary else ""
    return [*([f"{base_model} {problems}"] if problems else []), *shortcomings(scores, source)]
