"""Describe a mistake in params.yaml in one line: the key, the value, and what is allowed."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from tav.config.schema import CLIP_NAME_RULE, ClipParams, Params, Section, is_section, section_of_items

LONGEST_VALUE = 80
_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "greater than",
    "maximum": "at most",
    "exclusiveMaximum": "less than",
}
# Where pydantic reports a mistake in the key of a mapping, its location ends with this.
_OF_KEY = "[key]"


def describe_validation_error(error: ValidationError) -> str:
    """Return the first mistake in one line, and how many more there are."""
    # A key that is unknown explains one that is missing.
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return _describe(problems[0]) + more


def describe_option_errors(error: ValidationError, section: type[Section], options: Mapping[str, str]) -> str:
    """Return all mistakes in one line, by the options of a command line that set the values.

    Args:
        error: of the section.
        section: where the options' values belong.
        options: by key, the options that are not named after it.
    """
    by_option: dict[str, list[str]] = {}
    for problem in error.errors():
        key = str(problem["loc"][0])
        description = _describe(problem, section)
        if key not in options:
            description = description.removeprefix(f"{key}: ")
        by_option.setdefault(options.get(key, f"--{key}"), []).append(description)
    return "; ".join(f"{option}: {'; '.join(descriptions)}" for option, descriptions in by_option.items())


def _describe(problem: ErrorDetails, annotation: Any = Params) -> str:
    """Describe a mistake in a value of the type `annotation`."""
    *above, last = (str(part) for part in problem["loc"])
    key = on_one_line(".".join(above if last == _OF_KEY else [*above, last]))
    if last == _OF_KEY:
        return f"{key}: the clip's name {CLIP_NAME_RULE}"
    allowed = ""
    for part in [*above, last]:
        if is_section(annotation):
            if part not in annotation.model_fields:
                return f"{key}: unknown key{suggest(part, annotation.model_fields)}"
            allowed = describe_allowed(annotation.model_json_schema()["properties"][part])
        elif item := section_of_items(annotation):
            annotation = item
            allowed = f"a mapping with the keys {', '.join(item.model_fields)}"
            continue
        elif get_origin(annotation) is not dict:
            break  # An item of a list: the description of the list covers its items.
        annotation = annotation_below(annotation, part)
        if is_section(annotation):
            allowed = f"a mapping with the keys {', '.join(annotation.model_fields)}"
    if problem["type"] == "missing":
        return f"{key}: is missing; must be {allowed}"
    from_validator = problem["type"] == "value_error"
    reason = problem["msg"].removeprefix("Value error, ") if from_validator else f"must be {allowed}"
    if from_validator and isinstance(problem["input"], dict):
        return f"{key}: {reason}"  # Values that contradict each other: the reason names them.
    return f"{key}: {_short_repr(problem['input'])} is not allowed: {reason}"


def annotation_below(annotation: Any, key: str) -> Any:
    """Return the annotation of a key: of a section's field, or of an entry of `clips`."""
    return annotation.model_fields[key].annotation if is_section(annotation) else ClipParams


def describe_allowed(schema: Mapping[str, Any]) -> str:
    """Describe in words what the JSON schema of a value allows, such as "a whole number between 1 and 1000"."""
    match schema:
        case {"allowed": str(allowed)}:
            return allowed
        case {"anyOf": options}:
            return " or ".join(describe_allowed(option) for option in options)
        case {"enum": values}:
            return f"one of {', '.join(values)}"
        case {"type": "integer" | "number" as kind}:
            noun = "a whole number" if kind == "integer" else "a number"
            bounds = [f"{words} {schema[name]}" for name, words in _BOUNDS.items() if name in schema]
            if "minimum" in schema and "maximum" in schema:
                bounds = [f"between {schema['minimum']} and {schema['maximum']}"]
            multiple = f", a multiple of {schema['multipleOf']}" if "multipleOf" in schema else ""
            return " ".join([noun, " and ".join(bounds)]).strip() + multiple
        case {"type": "boolean"}:
            return "true or false"
        case {"type": "null"}:
            return "null"
        case {"type": "array", "items": items, "minItems": low}:
            high = f" to {schema['maxItems']}" if "maxItems" in schema else " or more"
            return f"a list of {low}{high} items, each {describe_allowed(items)}"
        case {"type": "object"}:
            return "a mapping from names to one or more clips"
        case _:
            return "a non-empty string" if schema.get("minLength") else "a string"


def suggest(key: str, allowed: Iterable[str]) -> str:
    """Return how an error about an unknown key ends: the key that was probably meant, and the allowed ones."""
    allowed = list(allowed)
    close = difflib.get_close_matches(key, allowed, 1)
    meant = f"; did you mean {close[0]}?" if close else ""
    return f"{meant} (allowed: {', '.join(allowed)})" if allowed else meant


def on_one_line(key: str) -> str:
    """Return a key as it is, or its `repr` where it is empty or has unprintable characters."""
    return key if key and key.isprintable() else repr(key)


def _short_repr(value: Any) -> str:
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = LONGEST_VALUE
    try:
        return short.repr(value)
    except ValueError:  # An integer of more digits than Python prints.
        return f"a value of the type {type(value).__name__}"
