"""Which characters count as control characters."""

from __future__ import annotations

import pytest

from tav.config.characters import has_control_characters


@pytest.mark.parametrize("text", ["", "a cat", "a\tcat\n", "ein süßer Kater 🐈", "\u2028"])
def test_texts_of_people_have_none(text: str) -> None:
    assert not has_control_characters(text)


@pytest.mark.parametrize("text", ["\x1b[2J", "a\rb", "\0", "\x85", "\ud800"])
def test_what_a_terminal_would_act_on(text: str) -> None:
    assert has_control_characters(text)


def test_the_allowed_ones_can_be_fewer() -> None:
    assert has_control_characters("a\tb", allowed="") and not has_control_characters("a b", allowed="")
