"""The stream of events: who receives what, and how a run is stopped."""

from __future__ import annotations

import threading

import pytest

from tav.runtime.events import (
    Event,
    EventStream,
    LoopEnded,
    LoopProgressed,
    LoopStarted,
    StageFailed,
    StageStarted,
    Stopped,
)


def started(clip: str = "ball") -> Event:
    return StageStarted(clip=clip, stage="tune")


def test_all_subscribers_receive_an_event_in_the_thread_that_published_it() -> None:
    received: list[tuple[str, Event, int]] = []
    events = EventStream(lambda event: received.append(("first", event, threading.get_ident())))
    event = started()
    with events.subscribed(lambda event: received.append(("second", event, threading.get_ident()))):
        events.publish(event)
    here = threading.get_ident()
    assert received == [("first", event, here), ("second", event, here)]
    events.publish(event)
    assert [name for name, *_ in received] == ["first", "second", "first"]


def test_a_subscriber_may_end_the_work() -> None:
    def full(event: Event) -> None:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        EventStream(full).publish(started())


def test_a_title_names_stage_and_clip() -> None:
    assert started().title == "tune ball"
    assert StageStarted(clip="", stage="encode").title == "encode"


def test_stopping_ends_loops_and_lets_them_report_how_they_ended() -> None:
    received: list[Event] = []
    events = EventStream(received.append)
    events.check()
    events.stop()
    state = {"clip": "ball", "stage": "tune", "done": 1, "total": 3, "unit": "step"}
    for event in (started(), LoopStarted(**state), LoopProgressed(**state)):
        with pytest.raises(Stopped):
            events.publish(event)
    with pytest.raises(Stopped):
        events.check()
    ended = [LoopEnded(**state, error=Stopped()), StageFailed(clip="ball", stage="tune", error=Stopped())]
    for event in ended:
        events.publish(event)
    assert received == ended


def test_being_stopped_is_no_failure() -> None:
    assert not issubclass(Stopped, Exception)
