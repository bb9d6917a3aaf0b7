"""Overrides: values for single keys of params.yaml, named by dotted keys such as `tune.steps`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, Literal, get_args, get_origin

from tav.config.error_messages import annotation_below, on_one_line, suggest
from tav.config.schema import Params, is_section
from tav.config.yaml_text import parse_value, styled
from tav_model.errors import TavError


def parse_overrides(arguments: Iterable[str]) -> dict[str, str]:
    """Return the `KEY=VALUE` arguments of a command line as a mapping that `load_params` accepts.

    Raises:
        TavError: an argument without `=`, or without a key before it.
    """
    overrides = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not key.strip():
            raise TavError(f"--set: {argument!r} is not allowed: must be KEY=VALUE, such as tune.steps=300")
        overrides[key.strip()] = value.strip()
    return overrides


def apply_override(name: str, content: MutableMapping[str, Any], dotted_key: str, value: Any) -> bool:
    """Set one value in the parsed content of a params.yaml, in place; the value itself is checked later.

    Args:
        name: name of the file, for messages.
        content: what the file contains; missing sections are added.
        dotted_key: such as `tune.steps`.
        value: the new value; a string is parsed as YAML, unless the key expects a string.

    Returns:
        Whether the value differs from the one before.

    Raises:
        TavError: an unknown key.
    """
    parent, annotation = content, Params
    *sections, key = dotted_key.split(".")
    for section in sections:
        annotation = _annotation_of(name, dotted_key, section, annotation, parent)
        if not isinstance(parent.get(section), MutableMapping):
            parent[section] = type(parent)()
        parent = parent[section]
    annotation = _annotation_of(name, dotted_key, key, annotation, parent)
    if isinstance(value, str):
        value = _parse_for(annotation, value)
    # In Python True equals 1, but in params.yaml they are different values.
    if key in parent and parent[key] == value and isinstance(parent[key], bool) == isinstance(value, bool):
        return False
    parent[key] = styled(value)
    return True


def _annotation_of(name: str, dotted_key: str, key: str, above: Any, parent: Mapping[str, Any]) -> Any:
    """Return the annotation of one key of `parent`, whose own annotation is `above`.

    Raises:
        TavError: an unknown key, or a clip that does not exist.
    """
    where = f"{name}: override {on_one_line(dotted_key)}"
    if get_origin(above) is dict:
        if key not in parent:
            clips = ", ".join(on_one_line(str(clip)) for clip in parent)
            raise TavError(f"{where}: no clip named {key!r}; there are: {clips}")
    elif not is_section(above):
        raise TavError(f"{where}: unknown key")
    elif key not in above.model_fields:
        raise TavError(f"{where}: unknown key{suggest(key, above.model_fields)}")
    return annotation_below(above, key)


def _parse_for(annotation: Any, text: str) -> Any:
    """Return the value that a string of a command line means for a key with this annotation."""
    options = (annotation,) if get_origin(annotation) in (None, list, dict, Literal) else get_args(annotation)
    if text == "null" and type(None) in options:
        return None
    if any(option is str or get_origin(option) is Literal for option in options):
        return text
    try:
        return parse_value(text)
    except Exception:  # The check of the parameters then reports the string itself.
        return text
