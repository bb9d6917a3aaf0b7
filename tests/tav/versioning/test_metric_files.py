"""The scores that DVC shows: those of clips that have been scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tav.versioning.metric_files import LIST, list_scores
from tests.support.projects import ROOT, fresh_clone, run


def listed(root: Path) -> list[str]:
    return yaml.safe_load((root / LIST).read_text())["metrics"]


def test_a_scored_clip_is_added_and_removed_clips_are_dropped(tmp_path: Path) -> None:
    clips = {"ball": 1, "cube": 1, "fish": 1}
    for clip in ("fish", "ball", "ball"):
        list_scores(tmp_path, clip, clips)
    assert listed(tmp_path) == [f"../results/{clip}/scores/metrics.json" for clip in ("ball", "fish")]
    list_scores(tmp_path, "cube", {"ball": 1, "cube": 1})
    assert listed(tmp_path) == [f"../results/{clip}/scores/metrics.json" for clip in ("ball", "cube")]


@pytest.mark.parametrize("text", ["", "metrics: [", "metrics: 3", "metrics: [a]", "- b"])
def test_a_damaged_list_is_written_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics").mkdir()
    (tmp_path / LIST).write_text(text)
    list_scores(tmp_path, "ball", {"ball": 1})
    assert listed(tmp_path) == ["../results/ball/scores/metrics.json"]


def test_the_project_begins_with_no_clips() -> None:
    assert listed(ROOT) == []


@pytest.mark.slow
def test_dvc_shows_the_scores_of_clips_that_have_run_and_no_errors(tmp_path: Path) -> None:
    project = fresh_clone(tmp_path / "project")
    assert run(project, "dvc", "metrics", "show").stdout == ""
    (project / "results/ball/scores").mkdir(parents=True)
    (project / "results/ball/scores/metrics.json").write_text(json.dumps({"mean": {"textual_alignment": 0.5}}))
    list_scores(project, "ball", {"ball": 1, "cube": 1})
    lines = run(project, "dvc", "metrics", "show").stdout.splitlines()
    assert [line.split() for line in lines] == [
        ["Path", "mean.textual_alignment"],
        ["results/ball/scores/metrics.json", "0.5"],
    ]
