"""`tav compare`: the tables that it prints."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
from datetime import datetime
from pathlib import Path

import pytest
from rich.console import Console

from tav.config.metrics import METRICS
from tav.tracking.comparison import compare
from tav.tracking.stored_runs import EDITS, EDITS_DIGEST, PipelineRun, read_runs
from tav.tracking.tracker import Tracker
from tav_cli.compare import fitting_table
from tests.support.compared_runs import write_compared_runs
from tests.support.projects import ROOT
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


def finished_run(params: dict[str, str], scores: dict[str, float], name: str = "ball") -> PipelineRun:
    return PipelineRun("0" * 32, name, "ball", datetime(2026, 1, 1), "finished", params, scores)


def printed(runs: list[PipelineRun], columns: int = 200) -> str:
    """What is printed of these runs on a console of that width."""
    text = io.StringIO()
    console = Console(file=text, width=columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tav.tracking.comparison.read_runs", lambda _: runs)
        (comparison,) = compare(ROOT)
    console.print(fitting_table(comparison, console)[0])
    return text.getvalue()


def test_table(tav: Tav, store: Path, wide: None) -> None:
    ended = tav("compare", "ball")
    lines = ended.out.splitlines()
    ids = {run.name: run.run_id[:8] for run in read_runs(store)}
    assert (ended.code, ended.err) == (0, "") and lines[0].strip() == "ball, best textual alignment first"
    (row,) = [line.split() for line in lines if "· self ·" in line]
    assert row[:6] == ["3", "ball", "·", "self", "·", "300"]
    assert row[7:14] == ["self", "4.0", "0.200", "0.900", "21.5", "dB", "0.010"]
    assert row[-1] == ids["ball · self · 300 steps"]
    assert "caption" not in ended.out and "tune" not in ended.out and "fish" not in ended.out
    assert "1 run without scores left out; --all shows them" in ended.out


def test_unfinished_runs_are_marked(tav: Tav, store: Path, wide: None) -> None:
    out = tav("compare", "ball", "--all").out
    assert "left out" not in out
    (line,) = [line for line in out.splitlines() if "no scores (failed)" in line]
    assert line.split()[0] == "4" and " 0 steps" in line


def test_the_best_of_each_metric_is_bold(store: Path) -> None:
    (comparison,) = compare(store, ["ball"])
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, color_system="standard", width=200)
    console.print(fitting_table(comparison, console)[0])
    bold = [part.partition("\x1b[0m")[0].strip() for part in text.getvalue().split("\x1b[1;32m")[1:]]
    # The best of each metric, frame_consistency twice; a metric without a known direction has none.
    assert sorted(bold) == sorted(["0.350", "0.900", "0.900", "21.5 dB", "21.5 dB", "0.010"])


@pytest.mark.parametrize(
    ("columns", "shown", "hidden"),
    [
        # The names tell attention.spatial, but the guidance scale only of those runs that are named by it.
        (64, {"alignment", "guidance_scale"}, {"consistency", "spatial", "flicker", "when", "id"}),
        (80, {"alignment", "guidance_scale", "consistency"}, {"spatial", "flicker", "when", "id"}),
        (120, {"alignment", "guidance_scale", "consistency", "spatial", "id"}, {"flicker", "when"}),
    ],
)
def test_one_table_with_what_matters_most_fits_the_terminal(
    tav: Tav, store: Path, monkeypatch: pytest.MonkeyPatch, columns: int, shown: set[str], hidden: set[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    wide = tav("compare", "ball").out
    assert "more column" not in wide and shown | hidden <= set(wide.split())
    monkeypatch.setenv("COLUMNS", str(columns))
    narrow = tav("compare", "ball").out
    assert max(len(line.rstrip()) for line in narrow.splitlines()) <= columns
    words = set(narrow.split())
    assert shown <= words and not hidden & words
    assert re.search(r"^\d+ more columns; --json prints everything$", narrow, re.MULTILINE)
    assert narrow.count("best textual alignment first") == 1


@pytest.mark.parametrize("columns", [80, 110, 160])
def test_parameters_that_were_swept_come_before_a_second_score(columns: int) -> None:
    names = {
        "5.0": "ball",
        "2.0": "ball · edit.guidance_scale 2.0",
        "3.0": "ball · edit.guidance_scale 3.0 · edit.steps 6",
    }
    runs = [
        finished_run(
            {"edit.guidance_scale": scale, "edit.steps": "6" if scale == "3.0" else "12"},
            dict.fromkeys(METRICS, 0.5),
            f"{name} · self · 100 steps",
        )
        for scale, name in names.items()
    ]
    heading = printed(runs, columns).partition("──")[0].split()
    assert heading.count("edit.") == 2 and {"guidance_scale", "steps", "alignment"} <= set(heading)


def test_control_is_one_column_with_the_kinds_of_its_networks() -> None:
    canny = {"control.0.kind": "canny", "control.0.scale": "1.0"}
    both = {"control.1.kind": "depth", "control.1.scale": "0.5"} | canny
    runs = [finished_run(control, {"flicker": 0.1 + index}) for index, control in enumerate([{}, canny, both])]
    _, heading, *rows = [line.split() for line in printed(runs).splitlines() if line.strip("─ ")]
    assert heading == ["run", "control", "flicker", "↓", "when", "run", "id"]
    assert [row[2] for row in rows] == ["-", "canny", "canny,depth"]


def test_scores_have_the_labels_of_the_catalogue() -> None:
    run = finished_run({}, {"consecutive_consistency": 0.9, "psnr_kept": 30.0, "of_another_version": 1.0})
    title, heading = printed([run]).partition("──")[0].split("\n", 1)
    assert title.strip() == "ball, best neighbour consistency first"
    assert {"neighbour", "PSNR", "of_another_version"} <= set(heading.split()) and "consecutive" not in heading


def test_clips_are_arguments_as_in_other_commands(tav: Tav, store: Path, wide: None) -> None:
    assert tav("compare", "ball") == tav("compare", "--clip", "ball")
    both = tav("compare", "fish", "--clip", "ball").out
    assert both == tav("compare").out and both.index("ball, best") < both.index("fish, best")


def test_long_names_are_wrapped_so_that_the_scores_fit(store: Path) -> None:
    (comparison,) = compare(store, ["fish"])
    name = " · ".join(["fish", *(f"setting {number}" for number in range(12))])
    runs = [dataclasses.replace(run, name=name) for run in comparison.runs]
    text = io.StringIO()
    console = Console(file=text, width=80)
    console.print(fitting_table(dataclasses.replace(comparison, runs=runs), console)[0])
    assert "…" not in text.getvalue() and "0.250" in text.getvalue()
    assert {"setting", "0", "11"} <= set(text.getvalue().split())


def test_means_over_other_edits_are_marked(
    tav: Tav, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wide: None
) -> None:
    note = "not all runs are known to have the same edits, so their means may not be comparable"
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    with Tracker("sqlite:///mlflow.db", "tav", tmp_path) as tracker:
        for steps, edits, digest in ((100, "6", "a"), (200, "6", "a"), (300, "5", "b"), (400, "5", "c")):
            run = tracker.pipeline("ball", {"tune.steps": steps})
            run.log_metrics({"textual_alignment": steps / 1000})
            run.set_tags({EDITS: edits, EDITS_DIGEST: digest})
            run.finish()
            out = tav("compare").out
            assert (note in out, "edits" in out.partition(note)[0].split()) == (steps > 200, steps > 200)
    rows = [line.split() for line in out.splitlines() if "steps" in line and "·" in line]
    assert [row[-4] for row in rows] == ["5", "5", "6", "6"]
    assert [row["edits"] for row in json.loads(tav("compare", "--json").out)] == [5, 5, 6, 6]


def test_an_unknown_clip_is_refused_in_one_line(tav: Tav, store: Path) -> None:
    ended = tav("compare", "cat")
    assert ended.code == 2 and "error: no runs of 'cat'; there are runs of: ball, fish" in ended.error
