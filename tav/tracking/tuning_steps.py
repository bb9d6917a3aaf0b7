"""The steps of a tuning as metrics of its MLflow run."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tav.runtime.events import Event, LoopProgressed, LoopResumed

if TYPE_CHECKING:
    from tav.tracking.tracker import Run
    from tav_model.tuning import StepRecord


class SmoothedLoss:
    """The loss by range of timesteps, smoothed exponentially.

    The loss of one step depends more on its timestep than on the progress of the tuning, so each range has its own curve.
    """

    RANGES = ((0, 250), (250, 500), (500, 750), (750, 1000))
    DECAY = 0.9

    def __init__(self) -> None:
        self._values: dict[str, float] = {}

    def update(self, loss: float, timestep: float) -> dict[str, float]:
        """Return the new value of the range that contains `timestep`, by the metric's name."""
        low, high = next((bounds for bounds in self.RANGES if timestep < bounds[1]), self.RANGES[-1])
        name = f"loss.timesteps_{low}_to_{high}"
        self._values[name] = self.DECAY * self._values.get(name, loss) + (1 - self.DECAY) * loss
        return {name: self._values[name]}


class TuningSteps:
    """Log each step of a clip's tuning: loss, smoothed loss, learning rate, gradient norm and steps per second.

    A subscriber of the stage's events. Steps from before an interruption are logged once more, because some of them may
    not have reached the store; their speed is unknown.
    """

    def __init__(self, run: Run, clip: str) -> None:
        self._run, self._clip = run, clip
        self._smoothed, self._last = SmoothedLoss(), time.monotonic()

    def __call__(self, event: Event) -> None:
        """Log the steps that an event is about."""
        if event.clip != self._clip or event.stage != "tune":
            return
        if isinstance(event, LoopResumed):
            self._smoothed = SmoothedLoss()
            for record in event.records:
                self._log(record)
            self._last = event.time
        elif isinstance(event, LoopProgressed):
            self._log(event.record, steps_per_second=1 / max(event.time - self._last, 1e-9))
            self._last = event.time

    def _log(self, record: StepRecord, **speed: float) -> None:
        values = {"loss": record.loss, "learning_rate": record.learning_rate, "gradient_norm": record.gradient_norm}
        values |= self._smoothed.update(record.loss, record.timestep)
        self._run.log_metrics(values | speed, step=record.step)
