"""Records and scores that stages have written, read back."""

from __future__ import annotations

from pathlib import Path

import pytest

from tav.config.results import read_record, read_scores


@pytest.mark.parametrize(
    ("text", "record"), [('{"prompt": "a cat"}', {"prompt": "a cat"}), ("[1]", {}), ('{"prompt": ', {}), (None, {})]
)
def test_a_record_that_is_missing_or_damaged_is_empty(tmp_path: Path, text: str | None, record: dict) -> None:
    if text is not None:
        (tmp_path / "cat.json").write_text(text)
    assert read_record(tmp_path / "cat.json") == record


def test_scores_by_name_without_the_metrics_that_an_edit_lacks(tmp_path: Path) -> None:
    (tmp_path / "scores.csv").write_text("name,prompt,category,clip_text,psnr\n1,a cat,object,0.5,\nb,a dog,,0.25,30\n")
    assert read_scores(tmp_path) == {"1": {"clip_text": 0.5}, "b": {"clip_text": 0.25, "psnr": 30.0}}
