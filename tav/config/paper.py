"""The settings of the paper, as overrides of params.yaml."""

from __future__ import annotations

from typing import Any

from tav.config.schema import AttentionParams, EditParams, InvertParams, TuneParams

_SECTIONS = {"attention": AttentionParams, "tune": TuneParams, "invert": InvertParams, "edit": EditParams}
# Not part of the method: how exactly and in what order to compute, and what to add to the file.
_LEFT_AS_THEY_ARE = {"precision", "trajectory", "autoregressive", "audio"}


def paper_settings() -> dict[str, Any]:
    """Return the settings of the paper (Wu et al., arXiv 2212.11565) by dotted key: the defaults of the schema.

    Precisions, sound and the order of windows are not among them.
    """
    return {
        f"{name}.{key}": value
        for name, section in _SECTIONS.items()
        for key, value in section().model_dump().items()
        if key not in _LEFT_AS_THEY_ARE
    }
