"""A clip's own settings, which replace those of the common sections, as plain values.

In params.yaml a clip may have settings of its own for each section that decides a result: `clips.ball.tune: {steps: 300}`
replaces `tune.steps` for the clip `ball`. DVC records both, the section and the clip's own settings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# The sections that a clip may have settings of its own for: those that decide a result.
SINGLE_VALUES = ("base_model", "seed", "control")
RESULT_SECTIONS = (*SINGLE_VALUES, "decode", "attention", "window", "encode", "tune", "invert", "edit", "score")
_OWN_KEY = re.compile(rf"clips\.[^.]+\.(?:{'|'.join(RESULT_SECTIONS)})")


LATER_SECTIONS = {"window": {"context_length": None}}
"""Sections that files of earlier versions lack, and what they contain there: what had the same results."""


def no_own_settings() -> dict[str, Any]:
    """Return the keys of a clip without settings of its own. They are in params.yaml because DVC looks for them there."""
    return {section: None if section in SINGLE_VALUES else {} for section in RESULT_SECTIONS}


def with_own_settings(common: Any, own: Any) -> Any:
    """Return the value of a section for a clip.

    Args:
        common: the section's value: a mapping, or that of `base_model`, `seed` or `control`, which is replaced as one.
        own: what the clip sets itself: a mapping of the keys to replace, or a single value; None: nothing.
    """
    if own is None:
        return common
    return {**common, **own} if isinstance(common, Mapping) and isinstance(own, Mapping) else own


def effective_settings(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a stage of a clip works with, from the parameters that DVC watches or has recorded for it.

    Args:
        recorded: values by key of params.yaml, such as `{"tune": {"steps": 400}, "clips.ball.tune": {"steps": 300}}`. A
            clip that lacks a key has no own settings of that section.

    Returns:
        Values by section, such as `{"tune": {"steps": 300}}`; other keys are as they were.
    """
    settings = {key: value for key, value in recorded.items() if not _is_own(key, recorded)}
    for key, own in recorded.items():
        if _is_own(key, recorded):
            section = key.rpartition(".")[2]
            settings[section] = with_own_settings(settings[section], own)
    return settings


def _is_own(key: str, recorded: Mapping[str, Any]) -> bool:
    return is_own_key(key) and key.rpartition(".")[2] in recorded


def is_own_key(key: str) -> bool:
    """Return whether a dotted key of params.yaml is that of a clip's own settings, such as `clips.ball.tune`."""
    return _OWN_KEY.fullmatch(key) is not None
