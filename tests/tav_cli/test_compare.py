"""`tav compare`: the tables that it prints."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from tav.tracking.comparison import compare
from tav.tracking.stored_runs import read_runs
from tav_cli.compare import tables
from tests.support.compared_runs import write_compared_runs
from tests.support.tav_command import Tav


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_compared_runs(tmp_path_factory.mktemp("a projèct"))


@pytest.fixture
def store(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a project with a store of runs."""
    monkeypatch.chdir(project)
    return project


@pytest.fixture
def wide(tav: Tav, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_table(tav: Tav, store: Path, wide: None) -> None:
    ended = tav("compare", "--clip", "ball")
    lines = ended.out.splitlines()
    ids = {run.name: run.run_id[:8] for run in read_runs(store)}
    assert (ended.code, ended.err) == (0, "") and lines[0].strip() == "ball, best textual_alignment first"
    (row,) = [line.split() for line in lines if "· self ·" in line]
    assert row[:6] == ["3", "ball", "·", "self", "·", "300"]
    assert row[7:13] == ["self", "4.0", "0.2000", "0.9000", "21.50", "0.0100"]
    assert row[-1] == ids["ball · self · 300 steps"]
    assert "caption" not in ended.out and "tune" not in ended.out and "fish" not in ended.out
    assert "1 run without scores left out; --all shows them" in ended.out


def test_unfinished_runs_are_marked(tav: Tav, store: Path, wide: None) -> None:
    out = tav("compare", "--clip", "ball", "--all").out
    assert "left out" not in out
    (line,) = [line for line in out.splitlines() if "no scores (failed)" in line]
    assert line.split()[0] == "4" and " 0 steps" in line


def test_the_best_of_each_metric_is_bold(store: Path) -> None:
    (comparison,) = compare(store, ["ball"])
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, color_system="standard", width=200)
    for table in tables(comparison, console):
        console.print(table)
    bold = [part.partition("\x1b[0m")[0].strip() for part in text.getvalue().split("\x1b[1;32m")[1:]]
    # The best of each metric, frame_consistency twice; a metric without a known direction has none.
    assert sorted(bold) == sorted(["0.3500", "0.9000", "0.9000", "21.50", "21.50", "0.0100"])


@pytest.mark.parametrize("columns", [60, 90])
def test_narrow_terminals_get_the_columns_in_several_tables(
    tav: Tav, store: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    wide = tav("compare", "--clip", "ball").out
    monkeypatch.setenv("COLUMNS", str(columns))
    narrow = tav("compare", "--clip", "ball").out
    assert "ball, further columns" in narrow and "further columns" not in wide
    assert max(len(line.rstrip()) for line in narrow.splitlines()) <= columns
    assert set(re.sub("─", "", wide).split()) <= set(narrow.split())


def test_long_names_are_wrapped_so_that_the_scores_fit(store: Path) -> None:
    (comparison,) = compare(store, ["fish"])
    name = " · ".join(["fish", *(f"setting {number}" for number in range(12))])
    runs = [dataclasses.replace(run, name=name) for run in comparison.runs]
    text = io.StringIO()
    console = Console(file=text, width=80)
    for table in tables(dataclasses.replace(comparison, runs=runs), console):
        console.print(table)
    assert "…" not in text.getvalue() and "0.2500" in text.getvalue()
    assert {"setting", "0", "11"} <= set(text.getvalue().split())


def test_an_unknown_clip_is_refused_in_one_line(tav: Tav, store: Path) -> None:
    ended = tav("compare", "--clip", "cat")
    assert ended.code == 2 and "--clip: no runs of 'cat'; there are runs of: ball, fish" in ended.error
