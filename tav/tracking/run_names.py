"""The names of the pipeline's runs: what every name shows, and the settings by which runs differ."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

# Parameters that every name shows, and how much of the others it may show.
NAMED = ("attention.spatial", "attention.temporal", "tune.steps")
MAX_PARTS, MAX_PART_LENGTH = 3, 40
SEPARATOR = " · "


def pipeline_name(clip: str, params: Mapping[str, str]) -> str:
    """Return what every name of a clip's runs begins with: `ball · first,former · 300 steps`."""
    parts = [clip, params.get("attention.spatial"), params.get("tune.steps") and f"{params['tune.steps']} steps"]
    if params.get("attention.temporal") == "False":
        parts.insert(2, "no temporal")
    return SEPARATOR.join(part for part in parts if part)


def with_settings(name: str, settings: Mapping[str, str]) -> str:
    """Return the name with a few settings by the keys of params.yaml: `ball · edit.steps 10 · first,former · 300 steps`.

    They follow the clip, because lists of runs cut off the ends of long names.
    """
    clip, *rest = name.split(SEPARATOR)
    others = [f"{key} {value}"[:MAX_PART_LENGTH] for key, value in settings.items() if key not in NAMED]
    return SEPARATOR.join([clip, *others[:MAX_PARTS], *(["…"] if len(others) > MAX_PARTS else []), *rest])


def distinct_name(name: str, params: Mapping[str, str], others: Mapping[str, Mapping[str, str]]) -> str:
    """Return a name that no other run of the clip has.

    Args:
        name: the name to make distinct.
        params: the parameters of the run, by dotted key.
        others: the parameters of the clip's other runs, by their names.
    """
    if name not in others:
        return name
    longer = with_settings(
        name, {key: value for key, value in params.items() if differs(key, (value, others[name].get(key)))}
    )
    return longer if longer not in others else _numbered(longer, others)


def differs(key: str, values: Iterable[str | None]) -> bool:
    """Return whether runs differ in a parameter.

    That a run has no control network is seen from the kind alone; it would be said once more for each of its settings.

    Args:
        key: the parameter, by its dotted key.
        values: its value in each run; None where a run does not have it.
    """
    details = key.startswith("control.") and not key.endswith(".kind")
    return len({value for value in values if not (details and value is None)}) > 1


def _numbered(name: str, taken: Container[str]) -> str:
    number = 2
    while f"{name} ({number})" in taken:
        number += 1
    return f"{name} ({number})"
