"""The benchmark of long clips: its targets, seams and drift on what is known, and the memory of a stage."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks import full_size
from benchmarks.length import (
    FULL_SIZE,
    QUICK_LENGTHS,
    SEAM,
    SHORT,
    VARIANTS,
    _longer_truth,
    borders_of,
    drift,
    main,
    measure_memory,
    measure_quality,
    memory_table,
    memory_targets,
    plot_drift,
    quality_table,
    quality_targets,
    seam_ratio,
    seams,
    time_table,
)
from benchmarks.measures import ROOT
from benchmarks.scenes import BenchmarkScene, EditResult, SceneRuns
from tav.config.stages import STAGES
from tav_model import WindowOptions
from toyworld.renderer import render
from toyworld.scenes import Scene, Truth, load_truth


def test_memory_is_flat_or_not() -> None:
    flat, grows = {16: 100.0, 64: 120.0, 256: 131.0}, {16: 100.0, 64: 120.0, 256: 140.0}
    measures = memory_targets({"tune": flat, "edit": grows})
    assert [(one.part, one.reached) for one in measures] == [("tune", True), ("edit", False)]
    assert not memory_targets({"tune": {16: 100.0, 32: 900.0}})  # Nothing is beyond two windows.
    assert "| edit" in memory_table({"tune": flat, "edit": grows}) and "140" in memory_table({"edit": grows})


def test_seams() -> None:
    borders = borders_of(12, WindowOptions(6, 4))
    assert borders == {4, 6, 10}
    errors = [1.0] * 11
    assert seam_ratio(errors, borders) == pytest.approx(1)
    for border in borders:
        errors[border - 1] = 3.0  # between the frame before and the one at the border
    assert seam_ratio(errors, borders) == pytest.approx(3)


def results(**scores: float) -> list[EditResult]:
    values = {"track_error": 0.1, "attributes_edited": 0.9, "attributes_kept": 0.9, "identity_error": 0.5} | scores
    return [EditResult(scene, "edit", "object", 1, values) for scene in ("a", "b")]


def test_long_clips_have_several_passes() -> None:
    truth = load_truth(ROOT / "data/scenes/ball.json")
    long = _longer_truth(truth, 256)
    assert long.frames == 256 and long.scene.passes == 8 and long.edits.keys() == truth.edits.keys()
    assert {edited.passes for edited in long.edits.values()} == {8}
    assert _longer_truth(truth, 12).scene == truth.scene


def test_quality_is_compared_with_the_interval_of_short_clips() -> None:
    measured = {
        f"{SHORT} frames": results(),
        "windows, 64 frames": results(),
        "pieces, 64 frames": results(track_error=1),
    }
    assert all(one.reached for one in quality_targets(measured))
    measured["windows, 64 frames"] = results(track_error=0.2)
    assert [one.name for one in quality_targets(measured) if not one.reached] == ["track error"]


def test_drift_is_small_for_one_object_and_large_for_others() -> None:
    scene = Scene(pattern="stripes")
    times = np.linspace(0, 1, 12).tolist()
    same = np.stack([render(scene, time) for time in times])
    patterns = ("stripes", "dots")  # It changes halfway.
    changed = np.stack([render(dataclasses.replace(scene, pattern=patterns[i // 6]), t) for i, t in enumerate(times)])
    steady, drifts = (drift(frames, scene, times, (1, 6)) for frames in (same, changed))
    assert steady.keys() == {1, 6} and steady[6] < drifts[6]
    assert drifts[6] > 2 * drifts[1]


@pytest.mark.long
def test_memory_of_the_stages_is_measured(tmp_path) -> None:
    scene = Scene()
    truth = Truth(scene, 24, {"blue": scene.edited(colour="blue")})
    measured = measure_memory(tmp_path, (3,), BenchmarkScene("ball", truth))
    assert tuple(measured) == STAGES
    assert all(30 < values[3] < 5000 for values in measured.values())
    assert [line.split()[1] for line in time_table(tmp_path, (3,)).splitlines()[2:]] == list(measured)
    (tmp_path / "3/memory.json").write_text('{"tune": 1}')
    assert measure_memory(tmp_path, (3,), BenchmarkScene("ball", truth))["tune"] == {3: 1}  # It is kept.


@pytest.mark.long
def test_memory_is_measured_with_a_base_model_of_random_weights(tmp_path, monkeypatch) -> None:
    small = {
        "block_out_channels": (32, 32, 32, 32),
        "in_channels": 4,
        "cross_attention_dim": 12,
        "attention_head_dim": 4,
    }
    monkeypatch.setitem(full_size.UNET_CONFIGS, "sd15", small)
    monkeypatch.setitem(full_size.TEXT_SHAPES, "sd15", (32, 12))
    monkeypatch.setattr(full_size, "CHANNELS", (32, 32, 32, 32))
    full_size.write_base(tmp_path / FULL_SIZE.base)
    scene = Scene()
    truth = Truth(scene, 24, {"blue": scene.edited(colour="blue")})
    setting = dataclasses.replace(FULL_SIZE, size=64)
    measured = measure_memory(tmp_path, (9,), BenchmarkScene("ball", truth), setting)
    assert all(30 < values[9] < 5000 for values in measured.values())


def test_unknown_part_is_refused(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    assert main(["speed", "--out", str(tmp_path)]) == 2
    assert "part 'speed': must be one of memory, full-size, quality" in capsys.readouterr().err
    assert QUICK_LENGTHS == (16, 64)


@pytest.mark.long
def test_quality_seams_and_drift_of_short_runs(tmp_path) -> None:
    scene = Scene()
    truth = Truth(scene, 24, {"blue": scene.edited(colour="blue")})
    steps = {f"{stage}.steps": 1 for stage in ("tune", "invert", "edit")}
    runs = SceneRuns(tmp_path / "runs", [BenchmarkScene("ball", truth)], 1, {**steps, "tracking.uri": None})
    measured = measure_quality(runs, (12,))
    assert set(measured) == {f"{SHORT} frames", *(f"{variant}, 12 frames" for variant in VARIANTS)}
    assert quality_table(measured).count("\n") == 5
    assert {one.part for one in quality_targets(measured)} == {"windows, 12 frames"}
    (seam,) = seams(runs, (12,))
    assert seam.value > 0 and seam.target == SEAM
    curves = plot_drift(runs, 12, tmp_path / "drift.png")
    assert curves.keys() == VARIANTS.keys() and set(curves["windows"]) == {1, 2, 4}
    assert (tmp_path / "drift.png").stat().st_size > 1000
