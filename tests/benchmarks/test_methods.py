"""The comparison of methods: its tables from the real stages, and which variants it accepts."""

import json
from pathlib import Path

import pytest

from benchmarks.measures import ROOT
from benchmarks.methods import BASELINE, SCORES, VARIANTS, main
from tav.config import EditParams, InvertParams
from toyworld.scenes import load_truth, save_truth

TINY = ("decode.frames=3", "tune.steps=2", "invert.steps=2", "edit.steps=2", 'runtime.device="cpu"')


def test_variants_are_parameters_that_exist():
    for changes in VARIANTS.values():
        for key, value in changes.items():
            section, name = key.split(".")
            ({"invert": InvertParams, "edit": EditParams}[section])(**{name: value})


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_variants_are_compared(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    truth = load_truth(ROOT / "data" / "scenes" / "ball.json")
    save_truth(tmp_path / "scenes" / "ball.json", truth.scene, truth.frames, {"blue-ball": {"colour": "blue"}})
    arguments = [
        "preset layout",
        "reconstruction",
        "--scenes",
        str(tmp_path / "scenes"),
        "--seeds",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*arguments, "--set", *TINY]) in (0, 1)
    out = capfd.readouterr().out
    assert f"| {BASELINE} " in out and f"| preset layout, minus {BASELINE}" in out
    assert all(score.heading in out for score in SCORES)
    assert (tmp_path / "out" / "methods.png").exists()
    assert (tmp_path / "out" / "reconstruction.png").exists()
    (measure,) = json.loads((tmp_path / "out" / "measures.json").read_text())
    assert measure["part"] == "reconstruction" and 0 < measure["value"] <= 1.01


def test_unknown_variants_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["magic", "--out", str(tmp_path)]) == 2
    assert "variant 'magic': must be one of tune-a-video; defaults; 50 steps; " in capsys.readouterr().err
