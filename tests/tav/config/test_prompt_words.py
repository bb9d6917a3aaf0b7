"""What is said of words that the base model of the parameters does not know."""

from __future__ import annotations

from pathlib import Path

import pytest

from tav.config.prompt_words import STABLE_DIFFUSION_PAGE, load_vocabulary, unknown_words_warning
from tests.support.models import small_base
from tests.support.projects import ROOT


def test_the_line_says_which_words_what_is_known_and_what_to_do(tmp_path: Path) -> None:
    warning = unknown_words_warning(tmp_path, "toyworld", ["a red ball", "a zebra, wearing a hat"])
    assert warning is not None
    assert warning.startswith('toyworld does not know "zebra", "wearing" or "hat"; it knows a ball, cube, star, ')
    assert "(all words: docs/reference/toyworld.md)" in warning and "\n" not in warning
    assert warning.endswith(f"use Stable Diffusion: {STABLE_DIFFUSION_PAGE}")
    assert (ROOT / STABLE_DIFFUSION_PAGE).is_file()
    assert unknown_words_warning(tmp_path, "toyworld", ["a red ball is bouncing on the grass"]) is None


@pytest.mark.parametrize("model", ["models/sd", "stable-diffusion-v1-5/stable-diffusion-v1-5", "missing"])
def test_nothing_is_said_of_other_models(tmp_path: Path, model: str) -> None:
    """Real ones, whose tokenizers know any word, and missing ones, which whoever needs them reports."""
    small_base(tmp_path / "models/sd")
    assert load_vocabulary(tmp_path, model) is None
    assert unknown_words_warning(tmp_path, model, ["a zebra"]) is None
