"""Nested parameters as flat mappings with dotted keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float]:
    """Return nested parameters by dotted keys: `{"attention.spatial": "first,former", "control.0.kind": "canny"}`.

    Lists are joined by commas, except those of mappings, whose places become parts of the keys.
    """
    flat: dict[str, str | int | float] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
            flat |= flatten({str(place): item for place, item in enumerate(value)}, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            flat[f"{prefix}{name}"] = ",".join(map(str, value))
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, int | float) else str(value)
    return flat
