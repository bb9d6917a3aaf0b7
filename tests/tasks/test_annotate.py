"""The stage annotate: conditions of each kind, which networks act where, and what it costs without control."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tasks.annotate
from tasks.clip_stages import ClipStages
from tasks.stage_control import StageControl
from tav.config import write_overrides
from tav.media.decoding import read_frames
from tav_model.annotators.edges import canny, lineart
from tav_model.control import ControlSignal
from tav_model.errors import TavError
from tav_model.tensors import load_tensors
from tav_model.video import read_video
from tests.support.models import controlnet, small_base
from tests.support.projects import ROOT
from toyworld.depth import render_depth
from toyworld.scenes import load_truth

PARAMS = """\
base_model: models/small
seed: 33
control: []
attention: {}
decode: {frames: 3, width: 128, height: 128}
encode: {}
tune: {}
invert: {}
edit: {}
score: {}
runtime: {device: cpu}
clips:
  ball: {video: data/ball.mp4, caption: a ball, prompts: data/ball.csv, decode: {start: 4}}
  fish: {video: data/fish.mp4, caption: a fish, prompts: data/ball.csv, decode: {start: 6}}
  cube: {video: data/ball.mp4, caption: a ball, prompts: data/ball.csv, decode: {frames: 4}}
"""
EDGES = {"kind": "canny", "model": "models/canny"}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a decoded clip."""
    root = tmp_path_factory.mktemp("annotate")
    (root / "params.yaml").write_text(PARAMS)
    small_base(root / "models/small")
    controlnet(conditioning_embedding_out_channels=(4, 8, 8, 8)).save_pretrained(root / "models/canny")
    shutil.copytree(ROOT / "data", root / "data")
    (root / "data/scenes/cube.json").unlink()
    ClipStages(root, "ball").run("decode")
    return root


@pytest.fixture
def project(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "project"))


def annotated(project: Path, *control: dict[str, Any]) -> Path:
    write_overrides(project / "params.yaml", {"clips.ball.control": list(control)})
    ClipStages(project, "ball").run("annotate")
    return project / "results/ball/control"


def frames_of(folder: Path, name: str) -> np.ndarray:
    return load_tensors(folder / f"{name}.safetensors")[0]["frames"].numpy()


def test_without_control_there_are_empty_lists_and_nothing_is_loaded(project: Path) -> None:
    folder = annotated(project)
    assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys(
        ("tune.json", "invert.json", "edit.json"), "[]\n"
    )
    assert not StageControl.read(project, folder, "edit")
    assert StageControl.read(project, folder, "edit").signal("models/small", "cpu", torch.float32) is None
    assert not ClipStages(project, "ball").needs_device("annotate")


def test_conditions_are_those_of_the_clips_frames(project: Path) -> None:
    own = load_tensors(project / "results/ball/frames/frames.safetensors")[0]["frames"].numpy()
    folder = annotated(project, EDGES, EDGES | {"kind": "lineart", "scale": 0.5, "stages": ["tune", "edit"]})
    assert np.array_equal(frames_of(folder, "0-canny"), canny(own))
    assert np.array_equal(frames_of(folder, "1-lineart"), lineart(own))
    assert read_video(folder / "1-lineart.mp4")[0].shape == own.shape
    acting = {stage: StageControl.read(project, folder, stage) for stage in ("tune", "invert", "edit")}
    assert {stage: control.summary for stage, control in acting.items()} == {
        "tune": "lineart 0.5",
        "invert": "canny 1",
        "edit": "canny 1, lineart 0.5",
    }
    signal = acting["edit"].signal(str(project / "models/small"), "cpu", torch.float32)
    assert isinstance(signal, ControlSignal)
    assert signal.num_frames == 3 and signal.scales == [1.0, 0.5]
    assert acting["edit"].with_scale(0.25).summary == "canny 0.25, lineart 0.25"


def test_depth_of_a_rendered_clip_is_exact(project: Path) -> None:
    folder = annotated(project, EDGES | {"kind": "depth"}, EDGES | {"kind": "depth", "source": "fish"})
    for name, clip, start in (("0-depth", "ball", 4), ("1-depth", "fish", 6)):
        truth = load_truth(project / f"data/scenes/{clip}.json")
        indexes = [start + round(i * (truth.frames - 1 - start) / 2) for i in range(3)]
        expected = np.stack([render_depth(truth.scene, time) for time in truth.times(indexes)])
        assert np.array_equal(frames_of(folder, name), expected)


def test_one_clip_may_drive_another(project: Path) -> None:
    folder = annotated(project, EDGES | {"source": "fish"})
    decode = ClipStages(project, "fish").params.decode
    assert np.array_equal(frames_of(folder, "0-canny"), canny(read_frames(project / "data/fish.mp4", decode)[0]))


def test_given_frames(project: Path) -> None:
    folder = annotated(project, {"kind": "given", "given": "data/ball.mp4", "model": "models/canny"})
    own = load_tensors(project / "results/ball/frames/frames.safetensors")[0]["frames"].numpy()
    assert np.array_equal(frames_of(folder, "0-given"), own)


def test_a_model_estimates_once_for_the_same_frames(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def estimate(kind: str, frames: np.ndarray, model: str, detector: Any, device: str, chunk: int, on_chunk: Any):
        calls.append((kind, Path(model).name, device))
        on_chunk(len(frames))
        return 255 - frames

    monkeypatch.setattr("tav_model.annotators.annotate.annotate", estimate)
    (project / "models/depth").mkdir()
    (project / "models/depth/config.json").write_text("{}")
    depth = EDGES | {"kind": "depth", "annotator": "models/depth"}
    folder = annotated(project, depth)
    assert ClipStages(project, "ball").needs_device("annotate")
    before = frames_of(folder, "0-depth")
    kept = {path.name: path for path in Path(shutil.copytree(folder, project / "kept")).iterdir()}
    monkeypatch.setattr(tasks.annotate, "previous_output", lambda root, path: kept)
    folder = annotated(project, depth | {"scale": 0.5})
    assert calls == [("depth", "depth", "cpu")] and np.array_equal(frames_of(folder, "0-depth"), before)
    (project / "models/depth/config.json").write_text("{ }")
    annotated(project, depth | {"scale": 0.5})
    assert len(calls) == 2


def test_a_condition_that_does_not_fit_leaves_the_results_as_they_are(project: Path) -> None:
    folder = annotated(project, EDGES)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.copy(project / "data/ball.mp4", project / "data/square.mp4")
    (project / "data/frames").mkdir()
    shutil.copy(ROOT / "docs/pictures/report.png", project / "data/frames/0.png")
    with pytest.raises(TavError, match=r"data/frames: has \d+x\d+ pixels; must have the shape of 128x128"):
        annotated(project, {"kind": "given", "given": "data/frames", "model": "models/canny"})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_network_that_changed_after_the_annotation_is_refused(project: Path) -> None:
    control = StageControl.read(project, annotated(project, EDGES), "edit")
    controlnet(1, conditioning_embedding_out_channels=(4, 8, 8, 8)).save_pretrained(project / "models/canny")
    with pytest.raises(TavError, match=r"models/canny: the control network has changed since the stage annotate"):
        control.networks("cpu", torch.float32)


def test_a_clip_that_is_not_annotated_and_a_damaged_record_are_refused(project: Path) -> None:
    write_overrides(project / "params.yaml", {"clips.ball.control": [EDGES]})
    with pytest.raises(TavError, match="ball: its control is not computed yet; tav run ball does it"):
        ClipStages(project, "ball").control("edit")
    folder = annotated(project, EDGES)
    (folder / "edit.json").write_text(json.dumps({"kind": "canny"}))
    with pytest.raises(TavError, match="not a list of control networks"):
        StageControl.read(project, folder, "edit")
