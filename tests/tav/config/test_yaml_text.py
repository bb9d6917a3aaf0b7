"""YAML as text: numbers and words as DVC reads them, and files that are not YAML."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tav.config import (
    load_params,
)
from tests.support.params import SHORT, refusal


@pytest.mark.parametrize("number", ["3e-5", "3E-5", "3.0e-5", "0.00003", "+3e-05", "3.e-5"])
def test_numbers_as_dvc_reads_them(path: Path, number: str) -> None:
    """YAML 1.1, and so PyYAML, takes 3e-5 for a text."""
    from dvc.utils.serialize import load_yaml

    path.write_text(SHORT.replace("tune: {}", f"tune: {{learning_rate: {number}}}"))
    assert load_params(path).tune.learning_rate == 3e-5 == load_yaml(str(path))["tune"]["learning_rate"]


@given(rate=st.floats(1e-300, 1, allow_nan=False), form=st.sampled_from(["{!r}", "{:e}", "{:.17g}", "{:.0e}"]))
@settings(max_examples=40)
def test_any_spelling_of_a_number(scratch: Path, rate: float, form: str) -> None:
    spelt = form.format(rate)
    scratch.write_text(SHORT.replace("tune: {}", f"tune: {{learning_rate: {spelt}}}"))
    if 0 < float(spelt) <= 1:
        assert load_params(scratch).tune.learning_rate == float(spelt)
    else:
        assert "tune.learning_rate" in refusal(scratch)


def test_words_that_yaml_1_1_takes_for_booleans_are_texts(path: Path) -> None:
    path.write_text(SHORT.replace("a ball,", "no,").replace("invert: {}", "invert: {prompt: on}"))
    params = load_params(path)
    assert (params.clips["ball"].caption, params.invert.prompt) == ("no", "on")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SHORT.replace("seed: 33", "seed: ["), "line 4, column 1: expected ',' or ']'"),
        (SHORT.replace("seed: 33", "seed: 33\nseed: 34"), 'line 3, column 1: found duplicate key "seed"'),
        (SHORT.replace("{start: 3,", "{start: 3, start: 4,"), 'line 12, column 88: found duplicate key "start"'),
        ("\tseed: 3", "line 1, column 1: found character '\\t'"),
        ("a: *b", "line 1, column 4: found undefined alias 'b'"),
        ("a: !!python/object/apply:os.system ['true']", "line 1, column 4: could not determine a constructor"),
        ("a: 1\n---\nb: 2", "line 2, column 1: but found another document"),
        ("a: \0", "not YAML (unacceptable character"),
        ("a: !!bool x", "not YAML"),
        ("a: !!float", "not YAML"),
        ("a: 2020-13-45", "not YAML (month must be in 1..12)"),
        ("a: " + "[" * 3000, "nested too deeply"),
        ("", "must be a mapping of sections"),
        ("- tune", "must be a mapping of sections"),
    ],
)
def test_what_is_not_yaml(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    answer = refusal(path)
    assert answer.startswith("params.yaml: ") and message in answer


def test_what_cannot_be_read(path: Path, tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent.yaml").endswith("absent.yaml: no such file; run this in the project's folder")
    assert "cannot be read (Is a directory)" in refusal(tmp_path)
    path.write_bytes(SHORT.replace("a ball", "ein Bällchen").encode("latin-1"))
    assert refusal(path).endswith("line 11: not UTF-8; save the file as UTF-8")
