"""The steps of a tuning in MLflow."""

import pytest

from tav.runtime.events import EventStream
from tav.runtime.progress import Progress
from tav.tracking.tracker import Tracker
from tav.tracking.tuning_steps import SmoothedLoss, TuningSteps
from tav_model.tuning import StepRecord
from tests.support.mlflow_store import PARAMS, URI, history


def test_loss_is_smoothed_within_its_range_of_timesteps():
    smoothed = SmoothedLoss()
    assert smoothed.update(1.0, 0) == {"loss.timesteps_0_to_250": 1.0}
    assert smoothed.update(5.0, 999) == {"loss.timesteps_750_to_1000": 5.0}
    assert smoothed.update(2.0, 249.5) == {"loss.timesteps_0_to_250": pytest.approx(1.1)}
    assert smoothed.update(3.0, 250) == {"loss.timesteps_250_to_500": 3.0}
    assert smoothed.update(4.0, 1200) == {"loss.timesteps_750_to_1000": pytest.approx(4.9)}


def test_steps_from_before_an_interruption_are_logged_once_and_without_a_speed(root):
    records = [StepRecord(step, 1 / step, 3e-5, 0.1, 100.0, 1.0) for step in range(1, 5)]
    for done, resumed in ((records[:2], []), (records[2:], records[:2])):
        with Tracker(URI, "tav", root) as tracker:
            steps = TuningSteps(tracker.pipeline("ball", PARAMS), "ball")
            with Progress(EventStream(steps), stage="tune", clip="ball", total=4) as progress:
                progress.resume_at(len(resumed), resumed)
                for record in done:
                    progress.update(record=record)
            with Progress(EventStream(steps), stage="tune", clip="cube") as other:
                other.update(record=records[0]._replace(step=9))
    assert history(root, "loss") == [(step, 1 / step) for step in range(1, 5)]
    assert [step for step, _ in history(root, "steps_per_second")] == [1, 2, 3, 4]
    smoothed = SmoothedLoss()
    expected = [smoothed.update(record.loss, record.timestep)["loss.timesteps_0_to_250"] for record in records]
    assert [value for _, value in history(root, "loss.timesteps_0_to_250")] == pytest.approx(expected)
