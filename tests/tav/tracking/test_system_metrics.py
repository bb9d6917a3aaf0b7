"""The use of the machine in MLflow."""

import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tav.tracking.system_metrics import system_metrics
from tav.tracking.tracker import Tracker
from tests.support.projects import ROOT

HOLD = """
from tav.tracking.system_metrics import peak_memory
before = peak_memory()
held = b"x" * int((before + 0.2) * 2**30)
assert 0.01 < before < peak_memory() < 200 and held
"""


def test_peak_memory_grows_with_what_is_held():
    """In a process of a process: Linux counts the peak of the one that starts it, which other tests have raised."""
    between = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', sys.argv[1]]))"
    done = subprocess.run([sys.executable, "-c", between, HOLD], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_system_metrics_are_in_the_store_and_outlast_its_absence(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with Tracker(uri, "tav", tmp_path) as tracker:
        run = tracker.pipeline("ball", {"tune.steps": 1})
        with system_metrics(run, interval=0.1):
            time.sleep(1)
        run.finish()
    client = MlflowClient(uri)
    (stored,) = client.search_runs([client.get_experiment_by_name("tav").experiment_id])
    history = client.get_metric_history(stored.info.run_id, "system/cpu_utilization_percentage")
    assert len(history) >= 3 and len({metric.step for metric in history}) == len(history)
    assert "system/system_memory_usage_megabytes" in stored.data.metrics

    # A run with metrics of its own logs those first.
    with Tracker(uri, "tav", tmp_path) as tracker:
        run = tracker.pipeline("fish", {})
        with system_metrics(run, interval=0.1, after_others=True):
            time.sleep(0.3)
            run.log_metrics({"loss": 1.0}, step=1)
            time.sleep(1)
        run.finish()
    (fish,) = client.search_runs([stored.info.experiment_id], "tags.`tav.clip` = 'fish'")
    assert next(iter(fish.data.metrics)) == "loss" and len(fish.data.metrics) > 1

    with caplog.at_level(logging.WARNING), Tracker("http://127.0.0.1:9", "tav", tmp_path) as tracker:
        run = tracker.pipeline("ball", {"tune.steps": 1})
        with system_metrics(run, interval=0.1):
            time.sleep(0.5)
        run.finish()
    assert "system metrics stopped" not in caplog.text
    assert "cpu_utilization" in (tmp_path / ".tav" / "tracking-missed.jsonl").read_text()
    with Tracker(None, "tav", tmp_path) as tracker, system_metrics(tracker.pipeline("ball", {}), interval=0.1):
        pass
