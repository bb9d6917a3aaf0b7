"""Characters that terminals, logs and web pages would act on."""

from __future__ import annotations

import unicodedata


def has_control_characters(text: str, allowed: str = "\t\n") -> bool:
    """Return whether a text has control characters or lone surrogates, other than the `allowed` ones."""
    return any(unicodedata.category(character) in ("Cc", "Cs") and character not in allowed for character in text)
