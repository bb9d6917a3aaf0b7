"""Digests change with what they are of, and with nothing else."""

from pathlib import Path

import pytest

from tav_model.digests import canonical_json, digest


def test_known_values():
    """Identities of finished work are stored; other values would render all of it again."""
    assert digest() == "e3b0c44298fc1c149afbf4c8996fb924"
    assert digest("a", b"b") == "14fe74fda61fa8bb568b103a35610131"


def test_where_one_part_ends_matters():
    assert digest("ab", "c") != digest("a", "bc") != digest("abc")


def test_files_count_by_name_within_a_folder_and_by_content(tmp_path: Path):
    (tmp_path / "one/sub").mkdir(parents=True)
    (tmp_path / "one/sub/x").write_text("content")
    first = digest(tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "two")
    assert digest(tmp_path / "two") == first
    (tmp_path / "two/sub/x").rename(tmp_path / "two/sub/y")
    renamed = digest(tmp_path / "two")
    assert renamed != first
    (tmp_path / "two/sub/y").write_text("Content")
    assert digest(tmp_path / "two") != renamed


def test_canonical_json_is_one_text_for_equal_values():
    assert canonical_json({"b": [1, "ü"], "a": None}) == canonical_json({"a": None, "b": [1, "ü"]})
    assert canonical_json({"b": [1, "ü"], "a": None}) == '{"a":null,"b":[1,"ü"]}'
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("nan"))
