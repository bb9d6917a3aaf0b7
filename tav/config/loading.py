"""Read params.yaml and check it before any work starts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tav.config.error_messages import describe_validation_error
from tav.config.overrides import apply_overrides
from tav.config.schema import Params
from tav.config.yaml_text import parse_mapping, read_yaml_text
from tav_model.errors import TavError


def load_params(path: Path, overrides: Mapping[str, Any] | None = None) -> Params:
    """Read and check params.yaml.

    Args:
        path: the file.
        overrides: values that replace the file's, by dotted key, such as `{"tune.steps": 300}`. A string is parsed as
            YAML, as on a command line, unless the key expects a string.

    Raises:
        TavError: with the file, the key, the value and what is allowed, for the first mistake, and the number of others.
    """
    text = read_yaml_text(path)
    if not overrides:
        return parse_params(path.name, text)
    content = parse_mapping(path.name, text)
    apply_overrides(path.name, content, overrides)
    return validate_params(path.name, content)


@lru_cache(maxsize=4)  # A command asks for the same file again for each clip, and parsing takes 30 ms.
def parse_params(name: str, text: str) -> Params:
    """Return the parameters in the text of a params.yaml; `name` is the file's name in messages.

    Raises:
        TavError: as for `load_params`.
    """
    return validate_params(name, parse_mapping(name, text))


def validate_params(name: str, content: Mapping[str, Any]) -> Params:
    """Return the parameters in the parsed content of a params.yaml; `name` is the file's name in messages.

    Raises:
        TavError: as for `load_params`.
    """
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        raise TavError(f"{name}: {describe_validation_error(error)}") from None
