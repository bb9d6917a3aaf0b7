"""Overrides: values for single keys of params.yaml, named by dotted keys such as `tune.steps`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, Literal, get_args, get_origin

from ruamel.yaml.comments import CommentedMap

from tav.config.clip_settings import RESULT_SECTIONS, SINGLE_VALUES
from tav.config.error_messages import annotation_below, on_one_line, suggest
from tav.config.schema import Params, is_section
from tav.config.yaml_text import parse_value, styled
from tav_model.errors import TavError

_ABSENT = object()


def parse_overrides(arguments: Iterable[str], option: str = "--set") -> dict[str, str]:
    """Return the `KEY=VALUE` arguments of a command line as a mapping that `load_params` accepts.

    Args:
        arguments: values of an option.
        option: its name, for messages.

    Raises:
        TavError: an argument without `=`, or without a key before it.
    """
    overrides = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not key.strip():
            raise TavError(f"{option}: {argument!r} is not allowed: must be KEY=VALUE, such as tune.steps=300")
        overrides[key.strip()] = value.strip()
    return overrides


def overrides_of_clips(overrides: Mapping[str, Any], clips: Iterable[str]) -> dict[str, Any]:
    """Return overrides that give clips settings of their own, in place of the common ones.

    Args:
        overrides: by dotted key, such as `{"tune.steps": 300}`. Keys of sections that a clip cannot have of its own, such as
            `runtime.device`, stay as they are.
        clips: names.
    """
    own: dict[str, Any] = {}
    for key, value in overrides.items():
        is_own = key.partition(".")[0] in RESULT_SECTIONS
        own |= {f"clips.{clip}.{key}": value for clip in clips} if is_own else {key: value}
    return own


def apply_overrides(name: str, content: MutableMapping[str, Any], overrides: Mapping[str, Any]) -> bool:
    """Set values in the parsed content of a params.yaml, in place; the values themselves are checked later.

    A clip's own setting that is the same as the common one is removed, so that DVC finds the results of the common one.

    Args:
        name: name of the file, for messages.
        content: what the file contains; missing sections are added.
        overrides: by dotted key, such as `tune.steps`. A string is parsed as YAML, unless the key expects a string.

    Returns:
        Whether the content has changed.

    Raises:
        TavError: an unknown key.
    """
    # Clips last, because their own settings are compared with the common ones.
    ordered = sorted(overrides.items(), key=lambda item: item[0].startswith("clips."))
    changes = [_apply_override(name, content, dotted_key, value) for dotted_key, value in ordered]
    return any(changes)


def _apply_override(name: str, content: MutableMapping[str, Any], dotted_key: str, value: Any) -> bool:
    """Set one value, as `apply_overrides`."""
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
    if _is_common_value(content, dotted_key, value):
        if key not in SINGLE_VALUES:
            return parent.pop(key, _ABSENT) is not _ABSENT
        if parent.get(key) is None:
            return False
        value = None
    if key in parent and _are_same(parent[key], value):
        return False
    parent[key] = styled(value)
    if isinstance(parent, CommentedMap) and (comments := parent.ca.items.get(key)):
        comments[3] = None  # Comments between the key and a list below it: ruamel.yaml would lose the next line's end.
    return True


def _is_common_value(content: Mapping[str, Any], dotted_key: str, value: Any) -> bool:
    """Return whether a clip is given the value of a setting that all clips have, so that it need not have its own."""
    if not dotted_key.startswith("clips."):
        return False
    common: Any = content
    for key in dotted_key.split(".")[2:]:
        if not isinstance(common, Mapping) or key not in common:
            return False
        common = common[key]
    return not isinstance(common, Mapping) and _are_same(common, value)


def _are_same(one: Any, other: Any) -> bool:
    """Return whether two values are the same in params.yaml, where true and 1 differ, unlike in Python."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


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
        sections = _sections_with(key) if above is Params else []
        if sections:
            raise TavError(f"{where}: unknown key; did you mean {' or '.join(f'{name}.{key}' for name in sections)}?")
        raise TavError(f"{where}: unknown key{suggest(key, above.model_fields)}")
    return annotation_below(above, key)


def _sections_with(key: str) -> list[str]:
    """Return the sections of params.yaml that have a key of this name."""
    sections = {name: field.annotation for name, field in Params.model_fields.items()}
    return [name for name, section in sections.items() if is_section(section) and key in section.model_fields]


def _parse_for(annotation: Any, text: str) -> Any:
    """Return the value that a string of a command line means for a key with this annotation."""
    options = (annotation,) if get_origin(annotation) in (None, list, dict, Literal) else get_args(annotation)
    if text == "null" and type(None) in options:
        return None
    names = [option for option in options if get_origin(option) is Literal]
    if str in options or text in (name for option in names for name in get_args(option)) or len(names) == len(options):
        return text
    try:
        return parse_value(text)
    except Exception:  # The check of the parameters then reports the string itself.
        return text
