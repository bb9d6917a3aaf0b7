"""The quick edits of a clip, as its report shows them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tav.reports import quick_edits
from tav.reports.quick_edits import read_quick_edits
from tests.support.reported import CAPTION, write_quick_edit

PROMPT = "a pink ball is bouncing on the grass"


@pytest.fixture
def quick(tmp_path: Path) -> Path:
    return tmp_path / "results/ball/quick"


def test_a_scored_edit_is_shown_under_a_name_of_its_own(tmp_path: Path, quick: Path) -> None:
    write_quick_edit(tmp_path, "pink", PROMPT, textual_alignment=0.5)
    found = read_quick_edits(quick, CAPTION, ())
    (edit,) = found.edits
    assert (edit.name, edit.prompt, edit.settings["steps"]) == ("quick/pink", PROMPT, 20)
    assert found.scores["quick/pink", PROMPT].scores == {"textual_alignment": 0.5}
    assert found.left_out == 0


def test_what_is_not_scored_or_in_the_csv_is_not_shown(tmp_path: Path, quick: Path) -> None:
    assert read_quick_edits(quick, CAPTION, ()).edits == []
    write_quick_edit(tmp_path, "row", PROMPT, identity="of a row", textual_alignment=0.5)
    write_quick_edit(tmp_path, "earlier", PROMPT)
    (quick / "scores/earlier.json").unlink()
    write_quick_edit(tmp_path, "damaged", PROMPT)
    (quick / "damaged.json").write_text("{")
    found = read_quick_edits(quick, CAPTION, ["of a row"])
    assert found.edits == [] and found.left_out == 2


def test_the_newest_are_shown(tmp_path: Path, quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick_edits, "MOST", 2)
    for age, name in enumerate(("c", "b", "a")):
        write_quick_edit(tmp_path, name, PROMPT, frames=np.zeros((2, 16, 16, 3), np.uint8))
        os.utime(quick / f"{name}.mp4", (1000 - age, 1000 - age))
    found = read_quick_edits(quick, CAPTION, ())
    assert [edit.name for edit in found.edits] == ["quick/b", "quick/c"] and found.left_out == 1
