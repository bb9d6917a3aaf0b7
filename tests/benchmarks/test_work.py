"""The benchmark of work: its variants, what it counts, its targets and exit code, and a small run of the real stages."""

import json
from pathlib import Path

import pytest

from benchmarks.measures import ROOT
from benchmarks.scenes import EditResult
from benchmarks.toyworld import SCORES
from benchmarks.work import (
    CANDIDATE,
    REFERENCE,
    VARIANTS,
    Work,
    differences_table,
    main,
    plot,
    targets,
    tuned_in,
    work_table,
    worse_scores,
)
from tav.config import EditParams, InvertParams, TuneParams
from toyworld.scenes import load_truth, save_truth

TINY = ("decode.frames=3", "tune.steps=4", "invert.steps=2", "edit.steps=2", 'runtime.device="cpu"')


def edits(**scores: float) -> list[EditResult]:
    usual = {score.key: 0.5 for score in SCORES}
    return [EditResult(str(scene), "a", "colour", 33, usual | scores) for scene in range(4)]


def work(share: float = 1.0) -> Work:
    return Work(share * 8e12, share * 1e12, share * 3e12, share * 400, share * 60)


def test_variants_are_parameters_that_exist_and_tune_on_their_own_where_they_change_it():
    for changes in VARIANTS.values():
        for key, value in changes.items():
            section, field = key.split(".")
            ({"tune": TuneParams, "invert": InvertParams, "edit": EditParams}[section])(**{field: value})
    alike = [name for name in VARIANTS if tuned_in(name)]
    assert {tuned_in(name) for name in alike} == {REFERENCE}
    assert "features of every 2nd step" in alike and REFERENCE not in alike and CANDIDATE not in alike
    assert not any(name.startswith(("tune", "LoRA", "early")) for name in alike)


def test_targets_are_a_quarter_of_the_operations_and_no_score_that_is_worse():
    usual = edits()
    for candidate, share, reached in (
        (edits(), 0.24, [True, True]),
        (edits(), 0.26, [False, True]),
        (edits(track_error=0.6), 0.1, [True, False]),
        (edits(track_error=0.4, psnr_to_truth=0.6), 0.1, [True, True]),
        (edits(attributes_kept=0.4), 0.1, [True, False]),
    ):
        measures = targets({REFERENCE: usual, CANDIDATE: candidate}, {REFERENCE: work(), CANDIDATE: work(share)})
        assert [one.reached for one in measures] == reached
    assert worse_scores(edits(attributes_kept=0.4, track_error=0.6), usual) == ["track error", "kept"]


def test_tables_and_plot_have_every_variant(tmp_path: Path):
    results, works = {REFERENCE: edits(), "other": edits(track_error=0.6)}, {REFERENCE: work(), "other": work(0.5)}
    lines = work_table(results, works).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:9]] == [
        *(REFERENCE, "400", "8.00", "1.00", "3.00", "12.00", "100 %", "60")
    ]
    assert [cell.strip() for cell in lines[3].split("|")[6:9]] == ["6.00", "50 %", "30"]
    assert "other, minus reference" in differences_table(results) and "*" in differences_table(results)
    plot(results, works, tmp_path / "work.png")
    assert (tmp_path / "work.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_variants_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["magic", "--out", str(tmp_path)]) == 2
    assert "variant 'magic': must be one of reference; 100 DDIM steps; " in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.timeout(400)
def test_work_is_counted_in_runs_of_the_real_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    # In a preset's steps without guidance, or in a single step, there is nothing to save.
    plain = {"edit.preset": "tune-a-video", "edit.steps": 4}
    changes = plain | {"tune.steps": 2, "tune.optimizer": "muon", "edit.guidance_end": 0.5, "tune.early_stopping": 20}
    monkeypatch.setitem(VARIANTS, CANDIDATE, changes)
    full = plain | {"tune.steps": 4, "tune.optimizer": "adamw"}
    monkeypatch.setitem(VARIANTS, REFERENCE, full)
    monkeypatch.setitem(VARIANTS, "features of every 2nd step", full | {"edit.feature_reuse_interval": 2})
    truth = load_truth(ROOT / "data" / "scenes" / "ball.json")
    save_truth(tmp_path / "scenes" / "ball.json", truth.scene, truth.frames, {"blue-ball": {"colour": "blue"}})
    arguments = ["--scenes", str(tmp_path / "scenes"), "--seeds", "1", "--out", str(tmp_path / "out"), "--set", *TINY]
    variants = [CANDIDATE, "features of every 2nd step"]
    assert main([*variants, *arguments]) in (0, 1)
    works = {name: Work(**one) for name, one in json.loads((tmp_path / "out" / "work.json").read_text()).items()}
    reference, candidate, reused = works[REFERENCE], works[CANDIDATE], works["features of every 2nd step"]
    assert (reference.tuning_steps, candidate.tuning_steps, reused.tuning_steps) == (4, 2, 4)
    assert 0.4 < candidate.tuning / reference.tuning < 0.7  # Muon multiplies matrices.
    assert reused.tuning == reference.tuning
    assert candidate.inversion == reference.inversion == reused.inversion
    assert candidate.edits < reference.edits and reused.edits < reference.edits
    assert reference.seconds > 0 and reused.seconds > 0
    assert (tmp_path / "out" / "work.png").exists()
    assert capfd.readouterr().out.count("| operations, share of the reference's ") == 1
    assert main([*variants, *arguments]) in (0, 1)  # From the cache.
    assert json.loads((tmp_path / "out" / "work.json").read_text())[REFERENCE]["edits"] == reference.edits
