"""The names of the pipeline's runs: what every name shows, and the settings by which runs differ."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

# How much a name may show of the parameters that not every name shows.
MAX_PARTS, MAX_PART_LENGTH = 3, 40
SEPARATOR = " · "
CONTROL = "control"  # stands for the kinds of all control networks: `canny,depth`


def pipeline_name(clip: str, params: Mapping[str, str]) -> str:
    """Return what every name of a clip's runs shows: `ball · canny control · first,former · 300 steps`."""
    return SEPARATOR.join(part for part in (clip, *_named(params).values()) if part)


def readable_key(key: str) -> str:
    """Return the key by which a parameter is shown: `control` for the kind of any control network, or its own."""
    return CONTROL if key.startswith(f"{CONTROL}.") and key.endswith(".kind") else key


def readable_value(key: str, params: Mapping[str, str]) -> str | None:
    """Return the value of a parameter by its readable key; None if the run does not have it."""
    if key != CONTROL:
        return params.get(key)
    return ",".join(params[one] for one in sorted(params) if readable_key(one) == CONTROL) or None


def tells(name: str, key: str, params: Mapping[str, str]) -> bool:
    """Return whether the name of a run with these parameters tells the value of one, which has a readable key."""
    parts, named = name.split(SEPARATOR), _named(params)
    if key in named:
        return named[key] is None or named[key] in parts
    return f"{key} {params.get(key)}" in parts


def _named(params: Mapping[str, str]) -> dict[str, str | None]:
    """Return what every name shows, by readable key; None where there is nothing to show."""
    control, steps = readable_value(CONTROL, params), params.get("tune.steps")
    return {
        CONTROL: control and f"{control} control",
        "attention.spatial": params.get("attention.spatial"),
        "attention.temporal": "no temporal" if params.get("attention.temporal") == "False" else None,
        "tune.steps": steps and f"{steps} steps",
    }


def with_settings(name: str, settings: Mapping[str, str]) -> str:
    """Return the name with a few settings by the keys of params.yaml: `ball · edit.steps 10 · first,former · 300 steps`.

    They follow the clip, because lists of runs cut off the ends of long names.
    """
    clip, *rest = name.split(SEPARATOR)
    named = _named({})
    others = [f"{key} {value}"[:MAX_PART_LENGTH] for key, value in settings.items() if readable_key(key) not in named]
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


def differs(key: str, values: Iterable[object]) -> bool:
    """Return whether runs differ in a parameter.

    That a run has no control network is seen from the kind alone; it would be said once more for each of its settings.

    Args:
        key: the parameter, by its dotted key.
        values: its value in each run; None where a run does not have it.
    """
    details = key.startswith(f"{CONTROL}.") and readable_key(key) != CONTROL
    return len({value for value in values if not (details and value is None)}) > 1


def _numbered(name: str, taken: Container[str]) -> str:
    number = 2
    while f"{name} ({number})" in taken:
        number += 1
    return f"{name} ({number})"
