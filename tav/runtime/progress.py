"""How far a loop is: counted here, published as events, and put into words."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from tav.runtime.events import EventStream, LoopEnded, LoopEvent, LoopProgressed, LoopResumed, LoopStarted


class Progress:
    """Count a loop of a stage, and publish each step.

    ``with Progress(events, stage="tune", clip="ball", total=300) as progress: progress.update(loss=0.12)``

    Args:
        events: receives the loop's events.
        row: the row of the prompt CSV that the loop renders, where it is a single one.
        total: how many updates there will be, where that is known; may be set later.
        unit: what is counted, in the singular.
    """

    def __init__(
        self,
        events: EventStream,
        *,
        stage: str,
        clip: str = "",
        row: str | None = None,
        total: int | None = None,
        unit: str = "step",
    ) -> None:
        self.events, self.stage, self.clip, self.row = events, stage, clip, row
        self.total, self.unit, self.done = total, unit, 0
        self._values: dict[str, Any] = {}
        self._mutex = threading.Lock()  # The rows of a clip may be rendered by several threads.

    def _state(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "clip": self.clip,
            "row": self.row,
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "values": dict(self._values),
        }

    def __enter__(self) -> Progress:
        self.events.publish(LoopStarted(**self._state()))
        return self

    def resume_at(self, done: int, records: Sequence[Any] = ()) -> None:
        """Count from `done`: another process or attempt did so many before, which rates leave out.

        Args:
            done: how many were done.
            records: what those steps measured.
        """
        self.done = done
        self.events.publish(LoopResumed(**self._state(), records=records))

    def update(self, n: int = 1, record: Any = None, **values: Any) -> None:
        """Count `n` more.

        Args:
            n: how many; negative where an attempt failed and its steps are done again.
            record: everything that the step measured, for subscribers that keep it.
            values: what people see beside the count; the latest of each name stays.
        """
        with self._mutex:
            self.done += n
            self._values |= values
            state = self._state()
        self.events.publish(LoopProgressed(**state, record=record))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.events.publish(LoopEnded(**self._state(), error=error))


class Pace:
    """The rate of a loop, smoothed so that the remaining time does not flip where other programs slow it for a moment.

    It is an average in which what lies back counts exponentially less: over about the last half of the loop's time, but
    at least one minute and at most ten. The first step, which often takes much longer than the others because models are
    loaded, gives no rate and is forgotten once there is a second.

    Args:
        event: where the loop begins here; what was done before does not count.
    """

    MIN_SECONDS, MAX_SECONDS = 60.0, 600.0

    def __init__(self, event: LoopEvent) -> None:
        self._began = self._time = event.time
        self._done = event.done
        self._weighted_done = self._weighted_seconds = 0.0
        self._updates = 0

    def update(self, event: LoopEvent) -> None:
        """Take an event of the loop into account."""
        seconds, done = event.time - self._time, event.done - self._done
        if seconds <= 0:
            return
        self._updates += 1
        if self._updates == 2:
            self._began, self._weighted_done, self._weighted_seconds = self._time, 0.0, 0.0
        window = min(max((event.time - self._began) / 2, self.MIN_SECONDS), self.MAX_SECONDS)
        decay = math.exp(-seconds / window)
        weight = window * (1 - decay)  # the integral of the decay over these seconds
        self._weighted_seconds = decay * self._weighted_seconds + weight
        self._weighted_done = decay * self._weighted_done + weight * done / seconds
        self._time, self._done = event.time, event.done

    def text(self, event: LoopEvent) -> str:
        """Return the rate and the remaining time: `3.20 step/s, 1:28 left`; empty where there is no rate yet."""
        if self._updates < 2 or self._weighted_done <= 0:
            return ""
        text = rate(self._weighted_done, self._weighted_seconds, event.unit)
        if event.total is None:
            return text
        left = (event.total - event.done) * self._weighted_seconds / self._weighted_done
        return f"{text}, {clock(left)} left"


def count_text(event: LoopEvent) -> str:
    """Return how far a loop is: `120/400 steps`, or `3 videos` where the total is unknown."""
    if event.total is None:
        return f"{event.done} {event.unit}{'' if event.done == 1 else 's'}"
    return f"{event.done}/{event.total} {event.unit}{'' if event.total == 1 else 's'}"


def values_text(values: Mapping[str, Any]) -> str:
    """Return what a loop reports beside its count: `loss 0.1234`."""
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )


def clock(seconds: float) -> str:
    """Return a duration as `0:07`, `12:03` or `1:00:00`."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def rate(done: float, seconds: float, unit: str) -> str:
    """Return a rate as `3.20 step/s`, or `1.50 s/step` where it is slower; empty where there is none yet."""
    if done <= 0 or seconds <= 0:
        return ""
    return f"{done / seconds:.2f} {unit}/s" if done >= seconds else f"{seconds / done:.2f} s/{unit}"
