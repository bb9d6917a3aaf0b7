"""YAML as text: parsed as DVC parses it, and written back with its comments."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from tav_model.errors import TavError, first_line
from tav_model.files import read_user_text

LARGEST_FILE = 2**20  # Bytes; ruamel.yaml takes a second for 50 KB.
# Strings that YAML reads as the same string without quotes, in any position.
_NEEDS_NO_QUOTES = re.compile(r"[^\W\d_][\w ./-]*(?<! )")


def read_yaml_text(path: Path) -> str:
    """Return the text of a YAML file.

    Raises:
        TavError: missing, too large, unreadable or not UTF-8.
    """
    if not path.exists():
        raise TavError(f"{path}: no such file; run this in the project's folder")
    return read_user_text(path, str(path), LARGEST_FILE)


def parse_value(text: str) -> Any:
    """Parse YAML 1.2 with the parser that DVC uses: 3e-5 is a number, `no` a string, a duplicate key an error."""
    return YAML(typ="safe", pure=True).load(text)


def parse_mapping(name: str, text: str) -> dict[str, Any]:
    """Parse YAML text that must be a mapping; `name` is the file's name in messages.

    Raises:
        TavError: not YAML, with the line and column where they are known, or not a mapping.
    """
    try:
        content = parse_value(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        raise TavError(f"{name}:{where} {first_line(error.problem)}") from None
    except RecursionError:
        raise TavError(f"{name}: nested too deeply") from None
    # Invalid dates, numbers and tags make the parser raise errors of many types.
    except Exception as error:
        raise TavError(f"{name}: not YAML ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise TavError(f"{name}: must be a mapping of sections, such as 'tune: {{steps: 500}}'")
    return content


def parse_with_comments(text: str) -> CommentedMap:
    """Parse YAML text into a mapping that remembers comments, order and quotes, for `dump_with_comments`."""
    return _round_trip().load(text)


def dump_with_comments(content: Mapping[str, Any]) -> str:
    """Return a mapping as YAML text, with the comments that `parse_with_comments` has found."""
    stream = io.StringIO()
    _round_trip().dump(content, stream)
    return stream.getvalue()


def styled(value: Any) -> Any:
    """Return a value in the style in which it is written: on one line, and quoted unless it is plain words.

    ruamel.yaml leaves out quotes that its own parser needs, such as those of ':0' in braces.
    """
    if isinstance(value, Mapping):
        braces = CommentedMap(value)
        braces.fa.set_flow_style()
        return braces
    if isinstance(value, list):
        brackets = CommentedSeq(value)
        brackets.fa.set_flow_style()
        return brackets
    if isinstance(value, str) and not _NEEDS_NO_QUOTES.fullmatch(value):
        return DoubleQuotedScalarString(value)
    return value


class _NullRepresenter(RoundTripRepresenter):
    """Writes None as `null`. A subclass, because DVC uses ruamel's own class for dvc.lock in the same process."""


_NullRepresenter.add_representer(
    type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
)


def _round_trip() -> YAML:
    yaml = YAML()
    yaml.Representer = _NullRepresenter
    yaml.preserve_quotes = True
    yaml.width = 10000
    return yaml
