"""Progress: a loop counted and published, and put into words."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest

from tav.runtime.events import Event, EventStream, LoopEnded, LoopProgressed, LoopResumed, LoopStarted
from tav.runtime.progress import Pace, Progress, clock, count_text, rate, values_text


def test_each_step_is_published_with_the_latest_values() -> None:
    received: list[Event] = []
    with Progress(EventStream(received.append), stage="tune", clip="ball", total=3) as progress:
        progress.update(record="first", loss=1.0)
        progress.update(2, rate=5)
    assert [type(event) for event in received] == [LoopStarted, LoopProgressed, LoopProgressed, LoopEnded]
    assert [(event.done, event.total, event.values) for event in received] == [
        (0, 3, {}),
        (1, 3, {"loss": 1.0}),
        (3, 3, {"loss": 1.0, "rate": 5}),
        (3, 3, {"loss": 1.0, "rate": 5}),
    ]
    assert [event.record for event in received[1:3]] == ["first", None]
    assert {(event.stage, event.clip, event.row) for event in received} == {("tune", "ball", None)}


def test_a_resumed_loop_publishes_the_records_of_before() -> None:
    received: list[Event] = []
    with Progress(EventStream(received.append), stage="tune", total=300) as progress:
        progress.resume_at(120, ["a", "b"])
        progress.update()
    _, resumed, progressed, _ = received
    assert isinstance(resumed, LoopResumed) and (resumed.done, resumed.records) == (120, ["a", "b"])
    assert progressed.done == 121


def test_a_failure_is_published_and_raised() -> None:
    received: list[Event] = []
    error = ValueError("no memory")
    with pytest.raises(ValueError, match="no memory"), Progress(EventStream(received.append), stage="tune"):
        raise error
    assert received[-1].error is error


def test_threads_count_together() -> None:
    received: list[Event] = []
    with Progress(EventStream(received.append), stage="edit", total=400) as progress:
        threads = [threading.Thread(target=lambda: [progress.update() for _ in range(100)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert progress.done == 400 and sorted(event.done for event in received[1:-1]) == list(range(1, 401))


def test_counts_values_rates_and_durations_in_words() -> None:
    state = {"clip": "ball", "stage": "score"}
    assert count_text(LoopProgressed(**state, done=120, total=400, unit="step")) == "120/400 steps"
    assert count_text(LoopProgressed(**state, done=1, total=None, unit="video")) == "1 video"
    assert values_text({"loss": 0.123456, "name": "cat"}) == "loss 0.1235, name cat"
    assert [rate(3, 2, "step"), rate(2, 3, "step"), rate(0, 3, "step")] == ["1.50 step/s", "1.50 s/step", ""]
    assert [clock(7), clock(723), clock(3600)] == ["0:07", "12:03", "1:00:00"]


def paces(total: int, seconds: Callable[[float], float]) -> Iterator[tuple[float, float, str]]:
    """Run a loop whose steps take `seconds` at a time; yield the time, the remaining time and the text after each."""
    state = {"clip": "ball", "stage": "tune", "total": total, "unit": "step"}
    now = 0.0
    pace = Pace(LoopStarted(**state, done=0, time=now))
    for step in range(1, total):
        now += seconds(now)
        event = LoopProgressed(**state, done=step, time=now)
        pace.update(event)
        left = re.search(r"(\d+):(\d+) left", pace.text(event))
        assert (left is None) == (step == 1)
        if left is not None:
            yield now, 60 * int(left[1]) + int(left[2]), pace.text(event)


def test_a_slow_first_step_is_forgotten() -> None:
    _, left, text = next(paces(100, lambda now: 0.5 if now else 60.0))
    assert (round(left), text) == (49, "2.00 step/s, 0:49 left")


def test_an_even_pace_is_known_from_the_second_step() -> None:
    assert {round(now + left) for now, left, _ in paces(100, lambda now: 2.0)} == {200}
    assert {text.partition(",")[0] for *_, text in paces(100, lambda now: 0.25)} == {"4.00 step/s"}


def test_the_remaining_time_does_not_flip_where_load_comes_and_goes() -> None:
    # Every other ten seconds, another program makes steps four times as slow.
    found = list(paces(1000, lambda now: 1.0 if now % 20 < 10 else 0.25))
    ends = [now + left for now, left, _ in found if now > 60]
    assert max(ends) < 1.25 * min(ends)
    assert max(later - earlier for earlier, later in pairwise(ends)) < 15


def test_the_remaining_time_follows_a_lasting_change() -> None:
    found = [(now, left) for now, left, _ in paces(1500, lambda now: 0.25 if now < 120 else 1.0)]
    end = found[-1][0] + 1
    (left,) = [left for now, left in found if now == 300]
    assert left == pytest.approx(end - 300, rel=0.25)


def test_there_is_no_pace_before_the_first_step_nor_after_steps_are_taken_back() -> None:
    state = {"clip": "ball", "stage": "edit", "total": 10, "unit": "step"}
    pace = Pace(LoopStarted(**state, done=4, time=0.0))
    for done, time in ((4, 1.0), (2, 2.0), (2, 2.0)):
        event = LoopProgressed(**state, done=done, time=time)
        pace.update(event)
        assert pace.text(event) == ""
