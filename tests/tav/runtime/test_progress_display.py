"""How loops are shown: lines in files and on standard error, bars on a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import struct
import sys
import termios
from types import SimpleNamespace

import pytest

from tav.runtime import events as module
from tav.runtime.events import EventStream, Stopped
from tav.runtime.progress import Progress
from tav.runtime.progress_display import ProgressBars, ProgressLines, standard_error_display


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that the test turns."""
    clock = SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(module, "time", clock)
    return clock


def shown(interval: float = 10) -> tuple[io.StringIO, EventStream]:
    stream = io.StringIO()
    return stream, EventStream(ProgressLines(stream, interval))


@pytest.mark.parametrize(
    ("interval", "between"),
    [
        (
            5,
            [
                "tune ball: 3/10 steps, 2.00 s/step, 0:14 left, loss 0.3704",
                "tune ball: 6/10 steps, 2.00 s/step, 0:08 left, loss 0.7407",
                "tune ball: 9/10 steps, 2.00 s/step, 0:02 left, loss 1.111",
            ],
        ),
        (
            10,
            [
                "tune ball: 5/10 steps, 2.00 s/step, 0:10 left, loss 0.6173",
                "tune ball: 10/10 steps, 2.00 s/step, 0:00 left, loss 1.235",
            ],
        ),
    ],
)
def test_lines_are_as_far_apart_as_asked_for(clock: SimpleNamespace, interval: float, between: list[str]) -> None:
    stream, events = shown(interval)
    with Progress(events, stage="tune", clip="ball", total=10) as progress:
        for step in range(1, 11):
            clock.now += 2
            progress.update(loss=0.123456 * step)
    assert stream.getvalue().splitlines() == [
        "tune ball: starts, 0/10 steps",
        *between,
        "tune ball: done, 10/10 steps in 0:20, 2.00 s/step, loss 1.235",
    ]


def test_a_resumed_loop_counts_on_and_its_rate_leaves_out_what_was_done_before(clock: SimpleNamespace) -> None:
    stream, events = shown()
    with Progress(events, stage="tune", total=300) as progress:
        clock.now += 30
        progress.resume_at(120)
        for _ in range(2):
            clock.now += 45
            progress.update(90)
    assert stream.getvalue().splitlines() == [
        "tune: starts, 0/300 steps",
        "tune: resumes at 120/300 steps",
        "tune: 210/300 steps",
        "tune: 300/300 steps, 2.00 step/s, 0:00 left",
        "tune: done, 300/300 steps in 1:30, 2.00 step/s",
    ]


def test_without_a_total_it_counts_and_a_total_may_come_later(clock: SimpleNamespace) -> None:
    stream, events = shown()
    with Progress(events, stage="score", unit="video") as progress:
        clock.now += 20
        progress.update(name="cat")
        progress.total = 3
        clock.now += 20
        progress.update()
    assert stream.getvalue().splitlines() == [
        "score: starts, 0 videos",
        "score: 1 video, name cat",
        "score: 2/3 videos, 20.00 s/video, 0:20 left, name cat",
        "score: done, 2/3 videos in 0:40, 20.00 s/video, name cat",
    ]


def test_nothing_to_do_is_one_line() -> None:
    stream, events = shown()
    with Progress(events, stage="edit", clip="ball", total=0):
        pass
    assert stream.getvalue() == "edit ball: nothing to do\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no memory\nand more"), "tune: failed at 1/3 steps after 0:07, ValueError: no memory"),
        (KeyboardInterrupt(), "tune: stopped at 1/3 steps after 0:07"),
        (Stopped(), "tune: stopped at 1/3 steps after 0:07"),
    ],
)
def test_a_failure_is_reported(clock: SimpleNamespace, error: BaseException, line: str) -> None:
    stream, events = shown()

    def fail() -> None:
        with Progress(events, stage="tune", total=3) as progress:
            clock.now += 7
            progress.update()
            raise error

    with pytest.raises(type(error)):
        fail()
    assert stream.getvalue().splitlines()[-1] == line


def test_rows_are_part_of_their_stage() -> None:
    stream, events = shown()
    with Progress(events, stage="edit", clip="ball", row="cat", total=3) as progress:
        progress.update()
    assert stream.getvalue() == ""


def test_loops_of_several_clips_keep_their_own_rates(clock: SimpleNamespace) -> None:
    stream, events = shown()
    with (
        Progress(events, stage="tune", clip="a", total=10) as a,
        Progress(events, stage="tune", clip="b", total=10) as b,
    ):
        for steps in (5, 2):
            clock.now += 10
            a.update(steps)
            b.update(1)
    assert [line for line in stream.getvalue().splitlines() if "left" in line] == [
        "tune a: 7/10 steps, 5.00 s/step, 0:15 left",
        "tune b: 2/10 steps, 10.00 s/step, 1:20 left",
    ]


def test_standard_error_is_left_empty_where_the_user_wants_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setenv("TAV_QUIET", "1")
    assert standard_error_display() == []
    monkeypatch.setenv("TAV_QUIET", "0")
    (display,) = standard_error_display()
    assert isinstance(display, ProgressLines)


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = pty.openpty()
    monkeypatch.delenv("TAV_QUIET", raising=False)
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        (display,) = standard_error_display()
        assert isinstance(display, ProgressBars)
        with Progress(EventStream(display), stage="edit", clip="ball", total=0):
            pass
        with Progress(EventStream(display), stage="tune", clip="ball", total=3) as progress:
            progress.resume_at(1)
            progress.update(2, loss=0.123456)
    output = b""
    with contextlib.suppress(OSError):  # Raised at the end of a terminal whose other side is closed.
        while part := os.read(master, 100_000):
            output += part
    os.close(master)
    text = output.decode()
    assert "tune ball: 100%" in text
    assert "3/3" in text
    assert "loss 0.1235" in text
    assert "starts" not in text and "edit" not in text
    assert text.count("\n") == 1
