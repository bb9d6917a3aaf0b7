"""Change params.yaml and keep its comments: write overrides back, add a clip, add keys that earlier versions lack."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tav.config.clip_settings import LATER_SECTIONS, no_own_settings
from tav.config.loading import load_params, parse_params, validate_params
from tav.config.overrides import apply_overrides
from tav.config.schema import Params
from tav.config.yaml_text import (
    dump_with_comments,
    parse_mapping,
    parse_with_comments,
    read_yaml_text,
    styled,
)
from tav_model.errors import TavError
from tav_model.files import write_text


def write_overrides(path: Path, overrides: Mapping[str, Any]) -> Params:
    """Change values in params.yaml by dotted key, keeping comments and order, and return the new parameters.

    A file that has these values already is not written.

    Args:
        path: the file; a symbolic link is followed.
        overrides: as for `load_params`.

    Raises:
        TavError: an unknown key or a value that is not allowed; the file is unchanged.
    """
    params = load_params(path, overrides)
    text = read_yaml_text(path)
    content = parse_with_comments(_with_newlines(text))
    if not apply_overrides(path.name, content, overrides):
        return params
    changed = dump_with_comments(content)
    params = parse_params(path.name, changed)
    write_text(path.resolve(), _with_newlines_of(text, changed))
    return params


def complete_keys(path: Path) -> None:
    """Add the keys to params.yaml that files of earlier versions lack, with nothing in them.

    They are `control`, and those of each clip for its own settings. DVC looks for them in the file, although to this project
    a missing key is the same.

    Args:
        path: the file; a symbolic link is followed.

    Raises:
        TavError: the file is not allowed.
    """
    text = read_yaml_text(path)
    params = parse_params(path.name, text)
    complete = all(no_own_settings().keys() <= clip.model_fields_set for clip in params.clips.values())
    if complete and {"control", *LATER_SECTIONS} <= params.model_fields_set:
        return
    content = parse_with_comments(_with_newlines(text))
    if "control" not in content:
        # Above the seed, to which ruamel.yaml attaches the comments that follow it.
        content.insert(list(content).index("seed"), "control", styled([]))
    for key, value in LATER_SECTIONS.items():
        if key not in content:
            content.insert(list(content).index("encode"), key, styled(value))
    for clip in content["clips"].values():
        for key, value in no_own_settings().items():
            if key not in clip:
                # Above the last key, to which ruamel.yaml attaches the comments that follow the clip.
                clip.insert(len(clip) - 1, key, styled(value))
    completed = dump_with_comments(content)
    parse_params(path.name, completed)
    write_text(path.resolve(), _with_newlines_of(text, completed))


def add_clip(path: Path, name: str, clip: Mapping[str, Any]) -> tuple[str, Params]:
    """Return the text of params.yaml with one more clip, the last of `clips`, and its parameters; write nothing.

    Every line of the file is kept, unless `clips` is written in braces.

    Args:
        path: the file.
        name: name of the new clip.
        clip: its entry, with the keys of `ClipParams`.

    Raises:
        TavError: a clip of this name exists, or the entry is not allowed.
    """
    text = read_yaml_text(path)
    params = parse_params(path.name, text)
    if name in params.clips:
        raise TavError(
            f"{path.name}: clips: {name!r} already exists; choose another name (--name), or change its entry in the file"
        )
    old = _with_newlines(text)
    content = parse_mapping(path.name, old)
    expected = {**content, "clips": {**content["clips"], name: dict(clip)}}
    params = validate_params(path.name, expected)
    new = _insert_clip(old, name, clip)
    if new is None or parse_mapping(path.name, new) != expected:
        commented = parse_with_comments(old)
        commented["clips"][name] = _styled_entry(clip)
        new = dump_with_comments(commented)
    return _with_newlines_of(text, new), params


def _insert_clip(text: str, name: str, clip: Mapping[str, Any]) -> str | None:
    """Return the text with the clip's lines below the last line of the block `clips`; None where `clips` is in braces."""
    clips = next(value for key, value in YAML(pure=True).compose(text).value if key.value == "clips")
    if clips.flow_style or not clips.value:
        return None
    column = clips.value[0][0].start_mark.column
    lines = text.split("\n")
    end = clips.end_mark.line + (clips.end_mark.column > 0)
    # The block ends where the next key begins; empty lines and comments directly above that key belong to the key.
    while end > len(lines) or not lines[end - 1].strip() or lines[end - 1].startswith("#"):
        end -= 1
    entry = dump_with_comments({name: _styled_entry(clip)}).removesuffix("\n")
    new = [" " * column + line for line in entry.split("\n")]
    return "\n".join([*lines[:end], *new, *(lines[end:] or [""])])


def _styled_entry(clip: Mapping[str, Any]) -> dict[str, Any]:
    return {key: styled(value) for key, value in clip.items()}


def _with_newlines(text: str) -> str:
    return text.replace("\r\n", "\n")


def _with_newlines_of(original: str, text: str) -> str:
    """Return the text with the line ends of the original: CRLF where it has any."""
    return text.replace("\n", "\r\n") if "\r\n" in original else text
