"""`tav report`: which pages it writes and opens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tav.reports import report as reports
from tests.support.tav_command import Tav


def test_report_writes_the_pages_and_prints_their_paths(tav: Tav, done: Path) -> None:
    shutil.rmtree(done / "results/cube", ignore_errors=True)
    for page in ("results/ball/report.html", "results/index.html"):
        (done / page).unlink()
    assert tav("report") == (0, "results/ball/report.html\nresults/index.html\n", "")
    assert "a blue ball" in (done / "results/ball/report.html").read_text()
    assert "ball/report.html" in (done / "results/index.html").read_text()


def test_report_opens_the_page_of_one_clip_or_the_overview(
    tav: Tav, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "write_report", lambda root, clip: root / "results" / clip / "report.html")
    monkeypatch.setattr(reports, "write_index", lambda root: root / "results/index.html")
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda uri: opened.append(uri) or True)
    assert json.loads(tav("report", "ball", "--json").out) == {
        "clips": {"ball": "results/ball/report.html"},
        "index": "results/index.html",
    }
    assert opened == []
    tav("report", "--open")
    tav("report", "ball", "--open")
    assert opened == [(done / path).as_uri() for path in ("results/index.html", "results/ball/report.html")]
    monkeypatch.setattr("webbrowser.open", lambda uri: False)
    assert tav("report", "--open").err == "no browser could be started; open results/index.html yourself\n"


def test_report_refuses_an_unknown_clip_and_an_empty_project(tav: Tav, new: Path) -> None:
    assert "no clip named 'cat'" in tav("report", "cat").error
    assert "no results to report yet; run `tav run` first" in tav("report").error
