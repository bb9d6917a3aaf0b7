"""The benchmark of control: its variants, what it concludes from scores, and its parts on random networks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.control import (
    BASELINE,
    DRIVEN,
    INVERSION,
    NOISE,
    PARTS,
    SCALES,
    curve_table,
    driven_measures,
    main,
    noise_measures,
    swap_measures,
    variants_of,
)
from benchmarks.measures import ROOT
from benchmarks.scenes import EditResult
from tav.config import ControlParams, EditParams
from toyworld.scenes import load_truth, save_truth
from toyworld.training.control import small_controlnet

TINY = (
    "decode.frames=2",
    "decode.width=64",
    "decode.height=64",
    "tune.steps=1",
    "invert.steps=1",
    "edit.steps=1",
    'runtime.device="cpu"',
)


def results(**scores: float) -> list[EditResult]:
    known = {"track_error": 0.1, "attributes_edited": 0.5, "attributes_kept": 1.0, "psnr_to_truth": 20.0}
    known |= {"motion_fidelity": 0.9, "silhouette": 0.5}
    return [EditResult(scene, "cube", "object", 33, known | scores) for scene in ("ball", "fish")]


def test_variants_are_parameters_that_exist() -> None:
    variants = variants_of(PARTS, ["ball", "fish", "cube"])
    assert next(iter(variants)) == BASELINE and set(NOISE) | set(INVERSION) | {DRIVEN} < set(variants)
    for changes in variants.values():
        for key, value in changes.items():
            if key.startswith("edit."):
                EditParams(**{key.removeprefix("edit."): value})
            else:
                assert [ControlParams(**one) for one in value]
    driven = variants[DRIVEN]
    assert {key: value[0]["source"] for key, value in driven.items() if not key.startswith("edit.")} == {
        "clips.ball.control": "fish",
        "clips.fish.control": "cube",
        "clips.cube.control": "ball",
    }
    assert list(variants_of(["noise"], ["ball"])) == [BASELINE, *NOISE]


def test_targets_are_those_of_depth_from_noise_and_of_object_swaps() -> None:
    found = {variant: results(track_error=0.36) for variant in NOISE} | {"random, depth": results(track_error=0.02)}
    reached = {one.part: (one.reached, one.target) for one in noise_measures(found)}
    assert reached == {"random": (True, None), "random, edges": (True, None), "random, depth": (True, 0.03)}
    found["random, depth"] = results(track_error=0.05)
    assert [one.reached for one in noise_measures(found)] == [True, True, False]

    plain, better, worse = results(), results(attributes_edited=0.9, silhouette=0.7), results(attributes_edited=0.4)
    for depth, expected in ((better, True), (worse, False)):
        for variant in ("depth", "presets, depth"):
            swaps = {BASELINE: plain} | dict.fromkeys(INVERSION, plain) | {variant: depth}
            assert all(one.reached for one in swap_measures(swaps, swaps)) is expected
    (driven,) = driven_measures(results(track_error=0.05))
    assert (driven.reached, driven.target) == (False, 0.04)


def test_the_curve_goes_from_no_control_to_the_strongest() -> None:
    found = {"random": results(), "random, depth": results(track_error=0.02)}
    found |= {f"random, depth, scale {scale:g}": results(track_error=0.05) for scale in SCALES if scale != 1}
    rows = [line.split("|")[1:3] for line in curve_table(found).splitlines()[2:]]
    assert [scale.strip() for scale, _ in rows] == ["0", "0.25", "0.5", "0.75", "1", "1.25", "1.5"]
    assert rows[4][1].strip() == "2.0 [2.0, 2.0] %"


def test_missing_networks_and_unknown_parts_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--networks", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}: no control network 'edges'; train it") and said.count("\n") == 1
    assert main(["magic", "--out", str(tmp_path / "out")]) == 2
    assert "part 'magic': must be one of noise, inversion, scale, driven, cost" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.timeout(900)
def test_one_clip_drives_another_and_control_costs_little(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from diffusers import UNet2DConditionModel

    from toyworld import WEIGHTS

    network = small_controlnet(UNet2DConditionModel.from_pretrained(WEIGHTS / "unet", local_files_only=True))
    for name in ("edges", "depth"):
        network.save_pretrained(tmp_path / "networks" / name)
    for name in ("ball", "fish"):
        truth = load_truth(ROOT / "data/scenes" / f"{name}.json")
        save_truth(tmp_path / "scenes" / f"{name}.json", truth.scene, truth.frames, {"cube": {"object": "cube"}})
    arguments = ["driven", "cost", "--scenes", str(tmp_path / "scenes"), "--seeds", "1", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--networks", str(tmp_path / "networks"), "--set", *TINY]) == 1  # An untrained network.
    assert f"| {DRIVEN} " in capfd.readouterr().out
    driven, seconds, memory = json.loads((tmp_path / "out/measures.json").read_text())
    assert driven["part"] == DRIVEN and not driven["reached"]
    assert seconds["name"].startswith("time") and seconds["value"] > 0
    assert memory["name"].startswith("memory") and memory["reached"]
    control = tmp_path / "out/runs/driven-by-the-next-clip/seed-0/results/ball/control/edit.json"
    assert json.loads(control.read_text())[0]["kind"] == "depth"
