"""Sweeps by `dvc exp run`: one after the other, and a queue; each is an MLflow run that a glance tells apart.

`test_end_to_end` runs one experiment; a queue takes minutes.
"""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from tav.config import no_own_settings
from tests.support.projects import QUICK, change_params, fresh_clone, run


def parents(project: Path) -> dict[str, str]:
    """Name and status of the MLflow runs of pipelines."""
    with sqlite3.connect(project / "mlflow.db") as store:
        return dict(
            store.execute(
                "select name, status from runs join tags on tags.run_uuid = runs.run_uuid "
                "where tags.key = 'tav.kind' and tags.value = 'pipeline'"
            )
        )


@pytest.mark.long
@pytest.mark.timeout(1000)
def test_a_sweep_and_a_queue(tmp_path: Path) -> None:
    project = fresh_clone(tmp_path / "project")
    clips = {
        "ball": {"video": "data/ball.mp4", "caption": "a red ball", "prompts": "data/ball.csv", **no_own_settings()}
    }
    change_params(project, QUICK, clips)
    (project / "data/ball.csv").write_text("name,prompt\nblue,a blue ball is bouncing\n")
    run(project, "git", "commit", "-qam", "one clip")

    run(project, "dvc", "exp", "run", "-n", "one-frame", "-S", "attention.spatial=[first]")
    assert parents(project) == {"ball · first · 4 steps": "FINISHED"}
    queue = ["dvc", "exp", "run", "--queue", "-S", "attention.spatial=[self]", "-S"]
    run(project, *queue, "edit.guidance_scale=9,11")
    run(project, "dvc", "exp", "run", "--run-all", timeout=800)
    queued = [f"ball · edit.guidance_scale {scale}.0 · self · 4 steps" for scale in (9, 11)]
    assert parents(project) == dict.fromkeys(["ball · first · 4 steps", *queued], "FINISHED")
    shown = json.loads(run(project, "dvc", "exp", "show", "--json").stdout)
    names = {one["name"] for row in shown if row["rev"] != "workspace" for one in row["experiments"] or []}
    assert "one-frame" in names and len(names) == 1 + len(queued)
    listed = json.loads(run(project, "tav", "compare", "--json").stdout)
    assert sorted(row["run"] for row in listed) == sorted(parents(project))
