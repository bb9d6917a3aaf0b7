"""What the base model does not know of captions and prompts, where it has a closed vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tav.config.paths import resolve_model
from tav_model.errors import TavError
from tav_model.vocabulary import Vocabulary, read_vocabulary

STABLE_DIFFUSION_PAGE = "docs/how-to/stable-diffusion.md"


def load_vocabulary(root: Path, base_model: str) -> Vocabulary | None:
    """Return the vocabulary of the base model that the parameters name; None where any word may be known.

    None also for a model that is missing, which whoever needs it reports.

    Raises:
        TavError: the model's vocabulary file is damaged.
    """
    try:
        base = resolve_model(root, base_model)
    except TavError:
        return None
    return read_vocabulary(base)


def unknown_words_warning(root: Path, base_model: str, texts: Iterable[str]) -> str | None:
    """Return one line on what the base model does not know of some texts, and what to do; None if there is nothing.

    Raises:
        TavError: as `load_vocabulary`.
    """
    vocabulary = load_vocabulary(root, base_model)
    problems = vocabulary.problems(texts) if vocabulary else ""
    if vocabulary is None or not problems:
        return None
    return (
        f"{base_model} {problems}; it knows {vocabulary.summary} (all words: {vocabulary.documentation}). "
        f"For anything else, use Stable Diffusion: {STABLE_DIFFUSION_PAGE}"
    )
