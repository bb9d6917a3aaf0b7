"""What is logged of a tuning, beside what it reports itself."""

import logging
import time
from pathlib import Path

import numpy as np
import pytest

from tav.tracking.clip_runs import SmoothedLoss, peak_memory
from tav.tracking.system_metrics import system_metrics
from tav.tracking.tracker import Tracker


def test_loss_is_smoothed_within_its_range_of_timesteps():
    smoothed = SmoothedLoss()
    assert smoothed.update(1.0, 0) == {"loss.timesteps_0_to_250": 1.0}
    assert smoothed.update(5.0, 999) == {"loss.timesteps_750_to_1000": 5.0}
    assert smoothed.update(2.0, 249.5) == {"loss.timesteps_0_to_250": pytest.approx(1.1)}
    assert smoothed.update(3.0, 250) == {"loss.timesteps_250_to_500": 3.0}
    assert smoothed.update(4.0, 1200) == {"loss.timesteps_750_to_1000": pytest.approx(4.9)}


def test_peak_memory_grows_with_what_is_held():
    before = peak_memory()
    held = np.ones(int((before + 0.2) * 2**30), np.uint8)
    assert 0.01 < before < peak_memory() < 200 and held.sum()


def test_system_metrics_are_in_the_store_and_outlast_its_absence(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with Tracker(uri, "tav", tmp_path) as tracker:
        run = tracker.pipeline("ball", {"tune.steps": 1})
        with system_metrics(run, interval=0.1):
            time.sleep(1)
        run.finish()
        assert run.tag("tav.kind") == "pipeline" and run.tag("nothing") is None
    client = MlflowClient(uri)
    (stored,) = client.search_runs([client.get_experiment_by_name("tav").experiment_id])
    history = client.get_metric_history(stored.info.run_id, "system/cpu_utilization_percentage")
    assert len(history) >= 3 and len({metric.step for metric in history}) == len(history)
    assert "system/system_memory_usage_megabytes" in stored.data.metrics

    with caplog.at_level(logging.WARNING), Tracker("http://127.0.0.1:9", "tav", tmp_path) as tracker:
        run = tracker.pipeline("ball", {"tune.steps": 1})
        with system_metrics(run, interval=0.1):
            time.sleep(0.5)
        run.finish()
        assert run.tag("tav.kind") is None
    assert "system metrics end here" not in caplog.text
    assert "cpu_utilization" in (tmp_path / ".tav" / "tracking-missed.jsonl").read_text()
    with Tracker(None, "tav", tmp_path) as tracker, system_metrics(tracker.pipeline("ball", {}), interval=0.1):
        pass
