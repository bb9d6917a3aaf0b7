"""The benchmark of the embedded model: its table, its exit code, and the scores of the method from the real stages."""

import json
from pathlib import Path

import pytest

from benchmarks import toyworld as benchmark
from benchmarks.toyworld import Measure, main, means, run_method, table
from toyworld import clips

TINY = {
    "decode.frames": 3,
    "tune.steps": 2,
    "invert.steps": 2,
    "edit.steps": 2,
    "runtime.device": "cpu",
}


@pytest.fixture
def one_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    ball = clips.CLIPS["ball"]
    monkeypatch.setattr(clips, "CLIPS", {"ball": clips.Clip(ball.scene, (ball.edits[0], ball.edits[-1]))})
    monkeypatch.setenv("TAV_QUIET", "1")


@pytest.mark.parametrize(
    ("measure", "reached", "cells"),
    [
        (Measure("a", "b", 0.951, 0.95), True, ["a", "b", "95.1 %", "at least 95.0 %", "yes"]),
        (Measure("a", "b", 0.949, 0.95), False, ["a", "b", "94.9 %", "at least 95.0 %", "NO"]),
        (Measure("a", "b", 0.079, 0.08, at_most=True), True, ["a", "b", "7.9 %", "at most 8.0 %", "yes"]),
        (Measure("a", "b", 0.081, 0.08, at_most=True), False, ["a", "b", "8.1 %", "at most 8.0 %", "NO"]),
        (Measure("a", "b", 31.2, percent=False), True, ["a", "b", "31.2", "", ""]),
    ],
)
def test_measures(measure: Measure, reached: bool, cells: list[str]):
    assert measure.reached == reached and measure.cells() == cells


def test_table_is_markdown():
    lines = table([Measure("VAE", "PSNR", 32.5, 30, percent=False), Measure("scorer", "captions", 1.0)]).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert set(lines[1]) == {"|", "-"} and len({len(line) for line in lines}) == 1


def test_unknown_parts_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["vea", "--out", str(tmp_path)]) == 2
    assert "part 'vea': must be one of vae, scorer, images, method, ablations" in capsys.readouterr().err
    assert main(["vae", "--set", "tune.steps=x", "--out", str(tmp_path)]) == 2


def test_exit_code_says_whether_everything_was_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for value, code in ((0.9, 0), (0.1, 1)):
        monkeypatch.setitem(benchmark.PARTS, "vae", lambda out, overrides, v=value: iter([Measure("VAE", "x", v, 0.5)]))
        assert main(["vae", "--out", str(tmp_path)]) == code
        assert ("NO" in capsys.readouterr().out) == bool(code)
        (saved,) = json.loads((tmp_path / "measures.json").read_text())
        assert saved["value"] == value and saved["reached"] == (not code)


@pytest.mark.slow
@pytest.mark.usefixtures("one_clip")
def test_the_method_is_judged_by_its_own_stages_and_not_run_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scores = run_method("without tuning", tmp_path, TINY)
    assert set(scores["ball"]) == {"blue-ball", "yellow-star-at-night"}
    mean = means(scores)
    assert {"frame_consistency", "textual_alignment", "consistency_to_truth"} <= set(mean)
    assert 0 <= mean["track_error"] <= 0.71 and mean["psnr_to_truth"] > 3
    assert 0 <= mean["attributes_edited"] <= 1 and 0 <= mean["attributes_kept"] <= 1
    from tasks.clip_stages import ClipStages

    monkeypatch.setattr(ClipStages, "run", lambda self, stage: pytest.fail(f"{stage} ran again"))
    assert run_method("without tuning", tmp_path, TINY) == scores

    monkeypatch.setattr(benchmark, "VARIANTS", {"without tuning": {"tune.steps": 0}})
    monkeypatch.setattr(benchmark, "_picture", lambda out: None)
    head, _, row = benchmark.measure_ablations(tmp_path, TINY).splitlines()
    assert head.count("|") == row.count("|") == 7 and "without tuning" in row and row.count("%") == 3


@pytest.mark.slow
@pytest.mark.usefixtures("one_clip")
def test_a_picture_of_all_variants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from PIL import Image

    variants = {"full method": {}, "without inversion": {"edit.start": "random"}}
    monkeypatch.setattr(benchmark, "VARIANTS", variants)
    assert (
        main(["ablations", "--out", str(tmp_path), "--set", *(f"{key}={json.dumps(TINY[key])}" for key in TINY)]) == 0
    )
    with Image.open(tmp_path / "ablations.png") as picture:
        assert picture.width > 3 * 128 and picture.height > 4 * 128
