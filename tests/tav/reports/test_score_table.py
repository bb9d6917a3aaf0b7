"""The scores as a table for a terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from tav.reports.report import write_report
from tav.reports.score_table import show
from tav_model.errors import TavError
from tests.support.reported import CLIP


def test_a_table_from_the_source_to_the_mean_and_where_the_rest_is(project: Path) -> None:
    lines = show(project, [CLIP, "fish"]).splitlines()
    assert lines[0] == "ball: attention first, former + temporal"
    assert [line.split()[0] for line in lines[3:8]] == ["(source)", "blue-ball", "cube", "on-sand", "(mean)"]
    assert lines[-3:] == [
        "videos:  results/ball/edits/",
        "picture: results/ball/contact-sheet.png",
        "report:  not written yet; run tav report ball",
    ]
    write_report(project, CLIP)
    assert show(project, [CLIP]).endswith("\nreport:  results/ball/report.html")


def test_no_scores(project: Path) -> None:
    with pytest.raises(TavError, match="no scores yet for fish; run dvc repro"):
        show(project, ["fish"])
