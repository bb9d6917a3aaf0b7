"""The runs that the stages of a clip leave in MLflow."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.source_settings import mask_image
from tav.config import load_params, write_overrides
from tav.config.metrics import METRICS
from tav.config.prompts import EditRow
from tav.tracking.clip_runs import ClipRuns
from tav.tracking.stored_runs import read_runs
from tav_model.errors import TavError
from tests.support.mlflow_store import history, runs
from tests.support.reported import CLIP, FRAMES, PROMPTS, make_results


@pytest.fixture
def project(tmp_path: Path, empty_database: Path) -> Path:
    root = tmp_path / "project"
    root.mkdir()
    make_results(root)
    shutil.copy(empty_database, root / "mlflow.db")
    (root / "results" / CLIP / "contact-sheet.png").touch()
    return root


def clip_runs(project: Path) -> ClipRuns:
    return ClipRuns(project, CLIP, load_params(project / "params.yaml"))


def edit_row(name: str) -> EditRow:
    return EditRow(name, PROMPTS[name], "object", "", 3.5, 20, 33, identity=name * 4)


@pytest.mark.slow
def test_a_parent_run_has_scores_and_durations_and_nothing_else(project: Path) -> None:
    with (edit := clip_runs(project)).reporting("edit"):
        for name in PROMPTS:
            edit.edit(edit_row(name))
    with (score := clip_runs(project)).reporting("score"):
        score.scores()
    parent, *children = runs(project)
    (clip,) = parent.inputs.dataset_inputs
    assert clip.dataset.name == CLIP and json.loads(clip.dataset.profile)["frames"] == FRAMES
    # MLflow's comparison opens on what was logged first, which the store returns first.
    assert next(iter(parent.data.metrics)) == "textual_alignment"
    names = {name for name in parent.data.metrics if not name.startswith(("source.", "seconds."))}
    assert {"textual_alignment", "frame_consistency"} <= names <= set(METRICS)
    assert {"seconds.edit", "seconds.score", "source.flicker"} <= set(parent.data.metrics)
    (read,) = read_runs(project)
    assert read.edits == len(PROMPTS) and read.edits_digest
    (stage,) = [run for run in children if run.data.tags["tav.kind"] == "stage"]
    assert stage.info.run_name == f"edit {CLIP}"
    assert stage.info.status == "FINISHED"
    assert stage.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert stage.data.metrics
    assert all(name.startswith("system/") for name in stage.data.metrics)


def test_control_that_is_new_since_the_last_commit_is_named_by_its_kind(project: Path) -> None:
    for command in ("init -q", "add params.yaml", "-c user.name=a -c user.email=a@b commit -qm params"):
        subprocess.run(["git", *command.split()], cwd=project, check=True)
    canny = {"kind": "canny", "model": "toyworld/controlnet/edges"}
    write_overrides(project / "params.yaml", {"control": [canny], "edit.guidance_scale": 2.0})
    name = clip_runs(project).pipeline.identity["name"]
    assert name.startswith(f"{CLIP} · edit.guidance_scale 2.0 · canny control · ")
    assert "control." not in name


def test_the_mask_of_an_edit_is_an_artifact_of_its_run(project: Path) -> None:
    mask = np.zeros((4, 6))
    mask[1:3, 2:5] = 1
    path = project / "results" / CLIP / "edits/cube.json"
    changes = {"identity": "2" * 32, "mask_image": mask_image(mask)}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with (score := clip_runs(project)).reporting("score"):
        score.scores()
    edits = [run for run in runs(project) if run.data.tags["tav.kind"] == "edit"]
    folders = {run.info.run_name: project / "mlartifacts" / run.info.run_id / "artifacts" for run in edits}
    masked = folders.pop("edit cube")
    assert [path.name for path in (masked / "mask").iterdir()] == ["cube.png"]
    assert (np.asarray(Image.open(masked / "mask/cube.png")) == (mask > 0)).all()
    assert folders
    assert not any((folder / "mask").exists() for folder in folders.values())


@pytest.mark.parametrize(("error", "status"), [(TavError("no room"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_all_runs_end_as_the_stage_ends(project: Path, error: BaseException, status: str) -> None:
    def stage() -> None:
        with (edit := clip_runs(project)).reporting("edit"):
            edit.edit(edit_row("cube"))
            raise error

    with pytest.raises(type(error)):
        stage()
    assert {run.data.tags["tav.kind"]: run.info.status for run in runs(project)} == {
        "pipeline": status,
        "stage": status,
        "edit": "FINISHED",
    }


def test_the_loss_on_held_out_noise_becomes_a_curve(project: Path) -> None:
    path = project / "results" / CLIP / "tuned/tuned.json"
    curve = [(20, 0.5), (40, 0.25)]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"held_out_loss": curve}))
    with (tune := clip_runs(project)).reporting("tune"), tune.tuning():
        pass
    (number,) = [i for i, run in enumerate(runs(project)) if run.data.tags["tav.kind"] == "tune"]
    assert history(project, "held_out_loss", run=number) == curve


def test_a_mistake_before_anything_was_done_leaves_no_run(project: Path) -> None:
    with pytest.raises(TavError), clip_runs(project).reporting("edit"):
        raise TavError("no such prompt")
    assert runs(project) == []


def test_a_run_has_the_settings_of_its_clip(project: Path) -> None:
    before = clip_runs(project)._settings(load_params(project / "params.yaml"))
    own = {f"clips.{CLIP}.edit.steps": 7, f"clips.{CLIP}.seed": 8, f"clips.{CLIP}.attention.spatial": ["self"]}
    params = write_overrides(project / "params.yaml", own)
    settings = ClipRuns(project, CLIP, params)._settings(params)
    assert {name for name in settings if settings[name] != before[name]} == {"edit.steps", "seed", "attention.spatial"}
    assert settings.keys() == before.keys()
    with (edit := clip_runs(project)).reporting("edit"):
        edit.edit(edit_row("cube"))
    (parent,) = [run for run in runs(project) if run.data.tags["tav.kind"] == "pipeline"]
    assert (parent.data.params["edit.steps"], parent.data.params["attention.spatial"]) == ("7", "self")


def test_tags_have_the_hashes_of_dvc_lock(project: Path) -> None:
    (project / "dvc.lock").write_text(
        f"""schema: '2.0'
stages:
  decode@{CLIP}:
    cmd: python -m tasks decode --clip {CLIP}
    deps:
    - path: data/{CLIP}.mp4
      hash: md5
      md5: a123
    outs:
    - path: results/{CLIP}/frames
      hash: md5
      md5: 4567.dir
  encode@{CLIP}:
    outs:
    - path: results/{CLIP}/latents
      hash: md5
      md5: 89ab.dir
"""
    )
    with (edit := clip_runs(project)).reporting("edit"):
        edit.edit(edit_row("cube"))
    (tags,) = [run.data.tags for run in runs(project) if run.data.tags["tav.kind"] == "edit"]
    assert {name: value for name, value in tags.items() if name.startswith("dvc.")} == {
        "dvc.video": "a123",
        "dvc.decode": "4567.dir",
        "dvc.encode": "89ab.dir",
    }
