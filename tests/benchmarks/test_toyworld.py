"""The benchmark of the embedded model: its table, its exit code, and the scores of the method from the real stages."""

import argparse
import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from benchmarks import toyworld as benchmark
from benchmarks.measures import ROOT
from benchmarks.scenes import RECONSTRUCTION, EditResult, SceneRuns, by_scene, edits_only, load_scenes
from benchmarks.toyworld import SCORES, Measure, main, table
from toyworld import WEIGHTS
from toyworld.scenes import load_truth, save_truth

TINY = {
    "decode.frames": 3,
    "tune.steps": 2,
    "invert.steps": 2,
    "edit.steps": 2,
    "runtime.device": "cpu",
}


@pytest.fixture
def one_scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the scene file of the ball, with two of its edits."""
    monkeypatch.setenv("TAV_QUIET", "1")
    truth = load_truth(ROOT / "data" / "scenes" / "ball.json")
    folder = tmp_path / "scenes"
    edits = {name: truth.changes(name) for name in ("blue-ball", "yellow-star-at-night")}
    save_truth(folder / "ball.json", truth.scene, truth.frames, edits)
    return folder


@pytest.mark.parametrize(
    ("measure", "reached", "cells"),
    [
        (Measure("a", "b", 0.951, 0.95), True, ["a", "b", "95.1 %", "at least 95.0 %", "yes"]),
        (Measure("a", "b", 0.949, 0.95), False, ["a", "b", "94.9 %", "at least 95.0 %", "NO"]),
        (Measure("a", "b", 0.079, 0.08, at_most=True), True, ["a", "b", "7.9 %", "at most 8.0 %", "yes"]),
        (Measure("a", "b", 0.081, 0.08, at_most=True), False, ["a", "b", "8.1 %", "at most 8.0 %", "NO"]),
        (Measure("a", "b", 31.2, percent=False), True, ["a", "b", "31.2", "", ""]),
        (
            Measure("a", "b", 0.02, 0.03, at_most=True, interval=(0.01, 0.042)),
            True,
            ["a", "b", "2.0 % [1.0 %, 4.2 %]", "at most 3.0 %", "yes"],
        ),
    ],
)
def test_measures(measure: Measure, reached: bool, cells: list[str]):
    assert measure.reached == reached and measure.cells() == cells


def test_table_is_markdown():
    lines = table([Measure("VAE", "PSNR", 32.5, 30, percent=False), Measure("scorer", "captions", 1.0)]).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert set(lines[1]) == {"|", "-"} and len({len(line) for line in lines}) == 1


def test_wrong_arguments_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = ["--out", str(tmp_path / "out")]
    assert main(["vea", *out]) == 2
    assert "part 'vea': must be one of vae, scorer, images, method, ablations" in capsys.readouterr().err
    assert main(["vae", "--set", "tune.steps=x", *out]) == 2
    assert "--set tune.steps=x: must be KEY=JSON" in capsys.readouterr().err
    assert main(["method", "--seeds", "0", *out]) == 2
    assert "--seeds 0: must be at least 1" in capsys.readouterr().err
    assert main(["method", "--scenes", str(tmp_path), *out]) == 2
    assert f"{tmp_path}: no scene file" in capsys.readouterr().err


def test_exit_code_says_whether_everything_was_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for value, code in ((0.9, 0), (0.1, 1)):
        measured = Measure("VAE", "x", value, 0.5)
        monkeypatch.setitem(benchmark.MODEL_PARTS, "vae", lambda base, count, out, m=measured: iter([m]))
        assert main(["vae", "--out", str(tmp_path)]) == code
        assert ("NO" in capsys.readouterr().out) == bool(code)
        (saved,) = json.loads((tmp_path / "measures.json").read_text())
        assert saved["value"] == value and saved["reached"] == (not code)


def result(scene: str, edit: str = "a", category: str = "colour", **scores: float) -> EditResult:
    usual = {score.key: 0.5 for score in SCORES}
    return EditResult(scene, edit, category, 33, usual | scores)


class KnownRuns(SceneRuns):
    """Runs whose results are known."""

    def __init__(self, results: dict[str, list[EditResult]]) -> None:
        self.results = results

    def run(self, variant, changes=None, tuned_in=None):
        return self.results[variant]


def test_the_method_is_measured_over_scenes_without_reconstructions():
    results = [
        result("one", track_error=0.01, frames_without_object=0.0),
        result("one", "b", "multiple", track_error=0.03, frames_without_object=0.5),
        result("two", track_error=0.02, frames_without_object=0.0, consistency_to_truth=-0.03),
        result("two", RECONSTRUCTION, RECONSTRUCTION, track_error=0.4, frames_without_object=1.0),
    ]
    measures = {m.name: m for m in benchmark.measure_method(KnownRuns({"full method": results}))}
    track = measures["track error, share of the width"]
    assert track.value == pytest.approx(0.02) and track.reached and track.interval == pytest.approx((0.02, 0.02))
    missing = measures["frames without their object, edits of one attribute"]
    assert missing.value == 0 and missing.reached
    distance = measures["frame consistency, distance from that of the true video"]
    assert distance.value == pytest.approx(abs(0.5 + 0.5 - 0.03) / 3) and not distance.reached


def test_ablations_show_what_differs_significantly(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(benchmark, "VARIANTS", {"full method": {}, "without tuning": {"tune.steps": 0}})
    full = [result(str(i), track_error=0.01 * i, identity_error=0.1 * (i % 2)) for i in range(6)]
    other = [result(str(i), track_error=0.01 * i + 0.05, identity_error=0.1 * (i % 3)) for i in range(6)]
    text = benchmark.measure_ablations(KnownRuns({"full method": full, "without tuning": other}))
    (line,) = [line for line in text.splitlines() if "without tuning, minus full" in line]
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[2] == "5.0 [5.0, 5.0] % *" and not cells[5].endswith("*")


def test_variants_that_change_nothing_are_left_out():
    names = benchmark._variants()
    assert "full method" in names and "self" in names
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    default = ", ".join(params["attention"]["spatial"])
    assert default not in names


def test_a_quick_run_has_few_scenes_and_one_seed(tmp_path: Path):
    parser = argparse.ArgumentParser()
    benchmark.add_scene_options(parser, "x")
    quick = benchmark.scene_runs(parser.parse_args(["--quick", "--out", str(tmp_path)]))
    usual = benchmark.scene_runs(parser.parse_args(["--out", str(tmp_path), "--set", "tune.steps=3"]))
    assert (len(quick.scenes), quick.seeds) == (3, 1) and (len(usual.scenes), usual.seeds) == (12, 3)
    assert usual.changes == {"tune.steps": 3}


@pytest.mark.slow
def test_the_method_runs_by_its_own_stages_and_not_twice(
    tmp_path: Path, one_scene: Path, monkeypatch: pytest.MonkeyPatch
):
    runs = SceneRuns(tmp_path / "runs", load_scenes([one_scene]), 1, TINY)
    results = runs.run("full method")
    assert {r.edit: r.category for r in results} == {
        "blue-ball": "colour",
        "yellow-star-at-night": "multiple",
        RECONSTRUCTION: RECONSTRUCTION,
    }
    for r in results:
        assert {score.key for score in SCORES} <= set(r.scores) and 0 <= r.scores["track_error"] <= 0.71
    assert len(edits_only(results)) == 2 and set(by_scene(results, "psnr_to_truth")) == {"ball"}
    from tasks.clip_stages import ClipStages

    monkeypatch.setattr(ClipStages, "run", lambda self, stage: pytest.fail(f"{stage} ran again"))
    assert runs.run("full method") == results
    tables = benchmark.method_tables(runs, WEIGHTS)
    assert "truth through the VAE" in tables and "ball, yellow-star-at-night" in tables and "| multiple " in tables
    monkeypatch.setattr(benchmark, "VARIANTS", {"full method": {}})
    assert benchmark.picture(runs, tmp_path / "ablations.png")
    with Image.open(tmp_path / "ablations.png") as picture:
        assert picture.width > 3 * 128 and picture.height > 3 * 128
