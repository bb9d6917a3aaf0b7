"""The main job on a real clip, by both entry points: real DVC, a real Prefect server and worker, a real MLflow store."""

from __future__ import annotations

import json
import os
import re
import shutil
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import pytest

from tav.config import no_own_settings
from tests.support.projects import QUICK, change_params, fresh_clone, run
from tests.support.servers import artifacts, run_deployment, serving, task_runs

if TYPE_CHECKING:
    from mlflow import MlflowClient

EDITS = {
    "mickey": "mickey mouse is skiing on the snow",
    "spider": "spider man is skiing on the beach, cartoon style",
    "wonder": "wonder woman, wearing a cowboy hat, is skiing",
    "pink": "a man, wearing pink clothes, is skiing at sunset",
}
CLIP = "man-skiing"


def skiing_project(folder: Path) -> Path:
    clips = os.environ.get("TAV_TEST_CLIPS")
    if not clips:
        pytest.skip("TAV_TEST_CLIPS does not name the folder of the real clips")
    project = fresh_clone(folder)
    shutil.copy(Path(clips) / "man-skiing.mp4", project / "data" / "man-skiing.mp4")
    write_prompts(project, EDITS)
    clip = {
        "video": "data/man-skiing.mp4",
        "caption": "a man is skiing",
        "prompts": "data/man-skiing.csv",
        **no_own_settings(),
    }
    change_params(project, QUICK, {CLIP: clip})
    return project


def write_prompts(project: Path, edits: dict[str, str]) -> None:
    lines = [f'{name},"{prompt}"' for name, prompt in edits.items()]
    (project / "data" / "man-skiing.csv").write_text("\n".join(["name,prompt", *lines, ""]))


def logged_runs(project: Path) -> list[dict[str, Any]]:
    """Return name, kind, parameters, metrics and artifacts of every MLflow run in the project's store."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    return [
        {
            "id": one.info.run_id,
            "name": one.info.run_name,
            "status": one.info.status,
            "tags": one.data.tags,
            "parent": one.data.tags.get("mlflow.parentRunId"),
            "params": one.data.params,
            "metrics": one.data.metrics,
            "losses": len(client.get_metric_history(one.info.run_id, "loss")),
            "files": artifact_files(client, one.info.run_id),
        }
        for one in runs
    ]


def artifact_files(client: MlflowClient, run_id: str) -> list[str]:
    files, folders = [], [""]
    while folders:
        for item in client.list_artifacts(run_id, folders.pop() or None):
            (folders if item.is_dir else files).append(item.path)
    return files


def check_results(project: Path, edits: dict[str, str]) -> None:
    results = project / "results" / CLIP
    for name, prompt in edits.items():
        with av.open(str(results / "edits" / f"{name}.mp4")) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
            assert sum(1 for _ in container.decode(stream)) == QUICK["decode"]["frames"]
        assert json.loads((results / "edits" / f"{name}.json").read_text())["prompt"] == prompt
        assert (results / "edits" / f"{name}.webp").stat().st_size > 0
    metrics = json.loads((results / "scores" / "metrics.json").read_text())
    table = (results / "scores" / "scores.csv").read_text().splitlines()
    assert sorted(line.split(",")[0] for line in table[1:]) == sorted(edits)
    assert {"frame_consistency", "textual_alignment", "frame_accuracy"} <= set(metrics["mean"])
    assert (results / "contact-sheet.png").stat().st_size > 0


def check_runs(project: Path, edits: dict[str, str]) -> None:
    runs = logged_runs(project)
    (parent,) = [one for one in runs if one["parent"] is None]
    children = [one for one in runs if one["parent"] == parent["id"]]
    assert len(runs) == 1 + len(children)
    assert {one["status"] for one in runs} == {"FINISHED"}
    assert parent["params"]["attention.spatial"] == "first,former"
    assert parent["params"]["tune.steps"] == str(QUICK["tune"]["steps"])
    assert "frame_consistency" in parent["metrics"]
    assert any(file.endswith("contact-sheet.png") for file in parent["files"])
    (tuning,) = [one for one in children if one["tags"]["tav.kind"] == "tune"]
    assert tuning["losses"] == QUICK["tune"]["steps"]
    rendered = {one["params"]["prompt"]: one for one in children if one["tags"]["tav.kind"] == "edit"}
    assert set(rendered) == set(edits.values())
    for one in rendered.values():
        assert "frame_consistency" in one["metrics"]
        assert any(file.endswith(".mp4") for file in one["files"])


def check_artifacts(prefect: dict[str, str], project: Path) -> None:
    """What Prefect's pages show beside the task runs."""
    shown = artifacts(prefect)
    finished = [f"progress-tune-{CLIP}", *(f"progress-edit-{CLIP}-{name}" for name in EDITS)]
    assert {key: shown[key] for key in finished} == dict.fromkeys(finished, ("progress", 100))
    kind, result = shown[f"result-{CLIP}"]
    assert kind == "markdown"
    assert all(prompt in result for prompt in EDITS.values()) and "textual alignment ↑" in result
    address = f"http://127.0.0.1:{prefect['TAV_MLFLOW_PORT']}"
    assert f"({address}/#/experiments/" in result and "/artifacts/report.html?" in result
    sheet = re.search(rf"!\[.*\]\(({address}/get-artifact.*)\)", result)
    with urllib.request.urlopen(sheet[1], timeout=30) as answer:
        assert answer.read() == (project / "results" / CLIP / "contact-sheet.png").read_bytes()


def check_experiment(project: Path) -> None:
    """`dvc exp run` runs what a parameter changes, and is an MLflow run more beside the one it came from."""
    run(project, "git", "add", "-A")
    run(project, "git", "commit", "-qm", "done")
    said = run(project, "dvc", "exp", "run", "-n", "weak", "-S", "edit.guidance_scale=2").stdout
    assert re.findall(r"Running stage '(\w+)@", said) == ["edit", "score"]
    shown = json.loads(run(project, "dvc", "exp", "show", "--json").stdout)
    assert "weak" in [one["name"] for row in shown for one in row["experiments"] or []]
    (first, second) = (one["name"] for one in logged_runs(project) if one["parent"] is None)
    assert {first, second} == {
        f"{CLIP} · first,former · 4 steps",
        f"{CLIP} · edit.guidance_scale 2.0 · first,former · 4 steps",
    }
    listed = json.loads(run(project, "tav", "compare", "--json").stdout)
    assert sorted(row["run"] for row in listed) == sorted([first, second])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_entry_points(tmp_path: Path, prefect: dict[str, str]) -> None:
    by_dvc = skiing_project(tmp_path / "by-dvc")
    run(by_dvc, "dvc", "repro")
    check_results(by_dvc, EDITS)
    check_runs(by_dvc, EDITS)
    lock = (by_dvc / "dvc.lock").read_bytes()
    check_experiment(by_dvc)

    by_prefect = skiing_project(tmp_path / "by-prefect")
    with serving(by_prefect, prefect):
        watched = run(by_prefect, "prefect", "deployment", "run", "tav/edit-batch", "--watch", **prefect).stdout
        assert f"tune {CLIP}: 100%" in watched and "textual alignment" in watched
        check_results(by_prefect, EDITS)
        check_runs(by_prefect, EDITS)
        stages = ("decode", "encode", "annotate", "tune", "invert")
        edits = [f"edit: {prompt}" for prompt in EDITS.values()]
        assert task_runs(prefect) == [f"{stage}: {CLIP}" for stage in stages] + edits + [f"score: {CLIP}"]

        check_artifacts(prefect, by_prefect)

        # One pipeline: the same lock file to the byte, and the other entry point finds nothing to do.
        assert (by_prefect / "dvc.lock").read_bytes() == lock
        assert "up to date" in run(by_prefect, "dvc", "status").stdout
        computed = task_runs(prefect, "Completed")
        run_deployment(by_prefect, prefect)
        assert task_runs(prefect, "Completed") == computed
        assert sorted(task_runs(prefect, "Cached")) == sorted(computed)

        # A row more renders one row, and an override runs what is downstream of it.
        more = EDITS | {"robot": "a robot is skiing"}
        write_prompts(by_prefect, more)
        run_deployment(by_prefect, prefect)
        computed += ["edit: a robot is skiing", f"score: {CLIP}"]
        assert task_runs(prefect, "Completed") == computed
        check_results(by_prefect, more)
        assert "up to date" in run(by_prefect, "dvc", "status").stdout

        run_deployment(by_prefect, prefect, overrides={"invert.steps": 2})
        computed += [f"invert: {CLIP}", *(f"edit: {prompt}" for prompt in more.values()), f"score: {CLIP}"]
        assert task_runs(prefect, "Completed") == computed
        assert "up to date" in run(by_prefect, "dvc", "status").stdout
