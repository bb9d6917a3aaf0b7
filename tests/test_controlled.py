"""A clip under control, by both entry points: the same results, and nothing to do afterwards."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from tav.config import load_params, no_own_settings
from tests.support.killing import Forked, wait
from tests.support.models import controlnet, small_base
from tests.support.projects import change_params, fresh_clone, run

QUICK = {
    "base_model": "models/small",
    "decode": {"frames": 2, "width": 64, "height": 64},
    "tune": {"steps": 2},
    "invert": {"steps": 2},
    "edit": {"steps": 2},
    "score": {"clip_model": None},
    "runtime": {"checkpoint_every": 1, "device": "cpu"},
    "tracking": {"uri": None},
}
EDGES = {"kind": "canny", "model": "models/canny", "scale": 0.5, "stages": ["tune", "invert", "edit"]}
CLIP = {"video": "data/ball.mp4", "caption": "a red ball", "prompts": "data/ball.csv", **no_own_settings()}
RESULTS = ("control", "tuned", "inverted", "edits")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a small base model and a ControlNet for it, in which nothing has run."""
    clone = fresh_clone(tmp_path_factory.mktemp("controlled") / "project")
    small_base(clone / "models/small")
    controlnet(conditioning_embedding_out_channels=(4, 8, 8, 8)).save_pretrained(clone / "models/canny")
    change_params(clone, QUICK | {"control": [EDGES]}, {"ball": CLIP})
    (clone / "data/ball.csv").write_text("name,prompt,control_scale\nball,a ball,\nfree,a ball,0\n")
    return clone


def outputs(project: Path) -> dict[str, bytes]:
    results = project / "results/ball"
    files = [path for name in RESULTS for path in sorted((results / name).rglob("*")) if path.is_file()]
    return {path.relative_to(results).as_posix(): path.read_bytes() for path in files}


def check_model(project: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an MLflow model, the clip is rendered under the same control."""
    import mlflow
    import pandas as pd

    from tasks import mlflow_model

    results = project / "results/ball"
    params = load_params(project / "params.yaml").for_clip("ball")
    frames = results / "frames/frames.safetensors"
    mlflow_model.save(
        folder, params, results / "tuned", results / "inverted", frames, "a red ball", results / "control"
    )
    monkeypatch.chdir(project)
    monkeypatch.setenv("TAV_DEVICE", "cpu")
    rows = pd.DataFrame({"prompt": ["a ball", "a ball"], "control_scale": [None, 0.0]})
    answer = mlflow.pyfunc.load_model(str(folder)).predict(rows)
    assert list(answer.video) == [(results / f"edits/{name}.mp4").read_bytes() for name in ("ball", "free")]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_entry_points_control_a_clip(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_dvc = Path(shutil.copytree(project, tmp_path / "by-dvc", symlinks=True))
    wait(Forked(by_dvc))  # The stages with their commits to DVC, without the seconds that each process takes to start.
    assert "up to date" in run(by_dvc, "dvc", "status").stdout
    by_flow = Path(shutil.copytree(project, tmp_path / "by-flow", symlinks=True))
    environment = {"HOME": str(tmp_path), "PREFECT_HOME": str(tmp_path / "prefect")}
    run(by_flow, "tav", "run", timeout=600, **environment)

    assert outputs(by_flow) == outputs(by_dvc)
    assert (by_flow / "dvc.lock").read_bytes() == (by_dvc / "dvc.lock").read_bytes()
    said = run(by_dvc, "tav", "run", **environment).stdout
    assert "ball: up to date" in said and "done in" not in said
    edits = by_flow / "results/ball/edits"
    assert json.loads((edits / "ball.json").read_text())["control"] == "canny 0.5"
    assert (edits / "ball.mp4").read_bytes() != (edits / "free.mp4").read_bytes()
    assert 'aria-label="Condition: canny"' in (by_flow / "results/ball/report.html").read_text()

    check_model(by_dvc, tmp_path / "model", monkeypatch)

    # Another network in the edits alone: of the heavy stages, only the edits run again.
    params = yaml.safe_load((by_dvc / "params.yaml").read_text())
    params["control"][0]["stages"] = ["tune", "invert"]
    params["control"].append({"kind": "lineart", "model": "models/canny", "scale": 1.0, "stages": ["edit"]})
    (by_dvc / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    said = run(by_dvc, "dvc", "repro", timeout=600).stdout
    assert re.findall(r"Running stage '(\w+)@", said) == ["annotate", "edit", "score"]

    # A quick edit beside the pipeline, under the same control at another scale.
    run(by_dvc, "tav", "edit", "ball", "a red ball", "--control-scale", "0.25")
    record = json.loads((by_dvc / "results/ball/quick/a-red-ball.json").read_text())
    assert record["control"] == "lineart 0.25" and record["control_scale"] == 0.25
