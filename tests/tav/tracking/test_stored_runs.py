"""Runs are read back from a store, which stays as it is; `tests/tav/tracking/test_comparison.py` reads broken ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tav.tracking.stored_runs import read_runs
from tav.tracking.tracker import Tracker
from tav_model.errors import TavError
from tests.support.mlflow_store import PARAMS, URI
from tests.support.projects import ROOT, change_params


@pytest.fixture
def project(root: Path) -> Path:
    shutil.copy(ROOT / "params.yaml", root)
    return root


def test_parent_runs_with_their_parameters_and_mean_scores(project: Path) -> None:
    with Tracker(URI, "tav", project) as tracker:
        run = tracker.pipeline("ball", PARAMS)
        run.log_metrics({"flicker": 0.5, "source.flicker": 0.25, "seconds.tune": 3.0})
        run.log_metrics({"system/cpu_utilization_percentage": 50.0}, step=1)  # as earlier versions did
        run.child("edit", "a", "edit a").log_metrics({"flicker": 0.75})
        run.finish()
        tracker.pipeline("skier", PARAMS)
    before = (project / "mlflow.db").read_bytes()
    skier, ball = sorted(read_runs(project), key=lambda run: run.clip, reverse=True)
    assert (project / "mlflow.db").read_bytes() == before
    assert (ball.clip, ball.name, ball.status) == ("ball", "ball · first,former · 300 steps", "finished")
    assert ball.scores == {"flicker": 0.5}
    assert ball.has_scores
    assert ball.parameters == {name: str(value) for name, value in PARAMS.items()}
    assert skier.status == "running"
    assert not skier.has_scores


def test_no_runs_and_no_store_are_errors(project: Path) -> None:
    with pytest.raises(TavError, match="no runs yet in sqlite:///"):
        read_runs(project)
    (project / "mlflow.db").unlink()
    with pytest.raises(TavError, match="no runs yet in sqlite:///"):
        read_runs(project)
    assert not (project / "mlflow.db").exists()
    change_params(project, {"tracking": {"uri": None}})
    with pytest.raises(TavError, match=r"tracking\.uri is null"):
        read_runs(project)
