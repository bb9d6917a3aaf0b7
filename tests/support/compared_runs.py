"""An MLflow store with runs that differ in parameters and scores, written as the stages write them."""

from __future__ import annotations

import shutil
from pathlib import Path

from tav.tracking.tracker import Tracker
from tests.support.projects import ROOT

BALL = {"attention.spatial": "first,former", "tune.steps": 300, "edit.guidance_scale": 4.0, "caption": "a red ball"}
SCORES = {"textual_alignment": 0.30, "frame_consistency": 0.90, "flicker": 0.02, "psnr_to_truth": 21.5}


def write_compared_runs(root: Path) -> Path:
    """A project with four runs of one clip, of which one has no scores, and two of another that are as good."""
    shutil.copy(ROOT / "params.yaml", root)
    with Tracker("sqlite:///mlflow.db", "tav", root) as tracker:

        def log(clip: str, changes: dict, scores: dict | None) -> None:
            run = tracker.pipeline(clip, BALL | changes)
            run.log_metrics({"seconds.tune": 12.0, "system/cpu_utilization_percentage": 50.0})
            if scores is None:
                run.finish("FAILED")
                return
            run.log_metrics(scores)
            run.log_metrics({f"source.{name}": 1.0 for name in scores})
            run.child("edit", "x", "edit blue").log_metrics(SCORES | {"textual_alignment": 0.99})
            run.finish()

        log("ball", {}, SCORES)
        log("ball", {"attention.spatial": "self"}, SCORES | {"textual_alignment": 0.20, "flicker": 0.01})
        log("ball", {"edit.guidance_scale": 9.0}, {"textual_alignment": 0.35, "frame_consistency": 0.8, "novelty": 7.0})
        log("ball", {"tune.steps": 0}, None)
        log("fish", {"caption": "a fish"}, {"textual_alignment": 0.25, "frame_consistency": 0.7})
        log("fish", {"caption": "a fish", "tune.steps": 9}, {"textual_alignment": 0.25, "frame_consistency": 0.7})
    return root
