"""Nested parameters as flat mappings with dotted keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float]:
    """Return nested parameters by dotted keys, lists joined by commas: `{"attention.spatial": "first,former"}`."""
    flat: dict[str, str | int | float] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            flat[f"{prefix}{name}"] = ",".join(map(str, value))
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, int | float) else str(value)
    return flat
