"""Progress: the lines and the bar that a loop shows, and where log records go."""

import contextlib
import fcntl
import logging
import os
import pty
import re
import struct
import sys
import termios
from types import SimpleNamespace

import pytest

from tav.runtime import progress as module
from tav.runtime.progress import Progress, display_on, stage_log
from tav_model.errors import TavError


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test turns."""
    clock = SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def stderr(monkeypatch, capsys):
    """What was written there since the last call."""
    monkeypatch.delenv("TAV_QUIET", raising=False)
    return lambda: capsys.readouterr().err


def without_times(text):
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d "
    lines = text.splitlines()
    assert all(re.match(stamp, line) for line in lines)
    return [re.sub(stamp, "", line, count=1) for line in lines]


def test_log_lines_are_5_s_apart_and_stderr_lines_10_s(clock, stderr, tmp_path):
    log = tmp_path / "logs" / "ball" / "tune.log"
    with Progress("tune ball", total=10, log=log) as progress:
        for step in range(1, 11):
            clock.now += 2
            progress.update(loss=0.123456 * step)
    assert without_times(log.read_text()) == [
        "tune ball: starts, 0/10 steps",
        "tune ball: 3/10 steps, 2.00 s/step, 0:14 left, loss 0.3704",
        "tune ball: 6/10 steps, 2.00 s/step, 0:08 left, loss 0.7407",
        "tune ball: 9/10 steps, 2.00 s/step, 0:02 left, loss 1.111",
        "tune ball: done, 10/10 steps in 0:20, 2.00 s/step, loss 1.235",
    ]
    assert stderr().splitlines() == [
        "tune ball: starts, 0/10 steps",
        "tune ball: 5/10 steps, 2.00 s/step, 0:10 left, loss 0.6173",
        "tune ball: 10/10 steps, 2.00 s/step, 0:00 left, loss 1.235",
        "tune ball: done, 10/10 steps in 0:20, 2.00 s/step, loss 1.235",
    ]


def test_a_resumed_loop_goes_on_counting_and_its_rate_leaves_out_what_was_done_before(clock, stderr, tmp_path):
    log = tmp_path / "tune.log"
    log.write_text("before\n")
    with Progress("tune", total=300, log=log) as progress:
        clock.now += 30
        progress.go_on_at(120)
        clock.now += 90
        progress.update(180)
    first, *lines = log.read_text().splitlines()
    assert first == "before"
    assert without_times("\n".join(lines)) == [
        "tune: starts, 0/300 steps",
        "tune: goes on at 120/300 steps",
        "tune: 300/300 steps, 2.00 step/s, 0:00 left",
        "tune: done, 300/300 steps in 1:30, 2.00 step/s",
    ]


def test_without_a_total_it_counts_and_a_total_may_come_later(clock, stderr):
    with Progress("score", unit="video") as progress:
        clock.now += 3600
        progress.update(name="cat")
        progress.total = 3
        clock.now += 10
        progress.update()
    assert stderr().splitlines() == [
        "score: starts, 0 videos",
        "score: 1 video, 3600.00 s/video, name cat",
        "score: 2/3 videos, 10.00 s/video, 0:10 left, name cat",
        "score: done, 2/3 videos in 1:00:10, 1805.00 s/video, name cat",
    ]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no memory\nand more"), "tune: failed at 1/3 steps after 0:07, ValueError: no memory"),
        (KeyboardInterrupt(), "tune: stopped at 1/3 steps after 0:07, KeyboardInterrupt"),
    ],
)
def test_a_failure_is_said_and_goes_on(clock, stderr, tmp_path, error, line):
    log = tmp_path / "tune.log"
    with pytest.raises(type(error)), Progress("tune", total=3, log=log) as progress:
        clock.now += 7
        progress.update()
        raise error
    assert without_times(log.read_text())[-1] == line
    assert stderr().splitlines()[-1] == line


def test_the_hook_hears_each_update(stderr):
    heard = []
    with Progress("tune", total=3, on_update=lambda *what: heard.append(what)) as progress:
        progress.update(loss=1.0)
        progress.update(2, rate=5)
    assert heard == [(1, 3, {"loss": 1.0}), (3, 3, {"loss": 1.0, "rate": 5})]


def test_quiet_leaves_stderr_empty_and_the_log_written(monkeypatch, stderr, tmp_path):
    monkeypatch.setenv("TAV_QUIET", "1")
    with Progress("tune", total=1, log=tmp_path / "tune.log") as progress:
        progress.update()
    assert stderr() == ""
    assert len((tmp_path / "tune.log").read_text().splitlines()) == 2


def test_a_terminal_gets_a_bar(monkeypatch):
    master, slave = pty.openpty()
    monkeypatch.delenv("TAV_QUIET", raising=False)
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with Progress("tune ball", total=3) as progress:
            progress.go_on_at(1)
            progress.update(2, loss=0.123456)
    shown = b""
    with contextlib.suppress(OSError):  # The end of a terminal whose other side is closed.
        while part := os.read(master, 100_000):
            shown += part
    os.close(master)
    shown = shown.decode()
    assert "tune ball: 100%" in shown
    assert "3/3" in shown
    assert "loss 0.1235" in shown
    assert "starts" not in shown


class Shown:
    """A display that notes what it is told."""

    def __init__(self):
        self.said = []

    def begin(self, progress):
        self.said.append(f"begin {progress.title} {progress.count()}")

    def update(self, progress):
        self.said.append(f"update {progress.count()} {progress.shown_values()}")

    def end(self, progress):
        self.said.append(f"end {progress.count()}")


def test_another_display_is_told_and_stderr_stays_empty(stderr, tmp_path):
    display = Shown()
    log = tmp_path / "tune.log"
    with display_on(display), pytest.raises(ValueError, match="why"), Progress("tune", total=3, log=log) as progress:
        progress.go_on_at(1)
        progress.update(loss=0.5)
        raise ValueError("why")
    assert display.said == [
        "begin tune 0/3 steps",
        "begin tune 1/3 steps",
        "update 2/3 steps loss 0.5",
        "end 2/3 steps",
    ]
    assert stderr() == "" and len(log.read_text().splitlines()) == 3
    with Progress("after"):
        pass
    assert len(display.said) == 4 and "after" in stderr()


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "logs").write_text("a file where a folder should be")
    with (
        pytest.raises(TavError, match=r"logs/tune\.log: the log cannot be written"),
        Progress("tune", log=tmp_path / "logs" / "tune.log"),
    ):
        pass


def test_the_stage_log_takes_records_whole_and_stderr_warnings_in_a_line(monkeypatch, stderr, tmp_path):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    logger = logging.getLogger("tasks.edit")
    log = tmp_path / "logs" / "edit.log"
    with stage_log(log):
        logger.info("row %s", "cat")
        try:
            raise ValueError("no memory")
        except ValueError:
            logger.exception("row dog failed")
    logger.info("after")
    text = log.read_text()
    assert "INFO tasks.edit: row cat" in text
    assert "ERROR tasks.edit: row dog failed\nTraceback" in text
    assert text.rstrip().endswith("ValueError: no memory")
    assert stderr() == "error: row dog failed\n"


def test_the_stage_log_leaves_the_loggers_as_they_were(tmp_path):
    logger = logging.getLogger("tasks")
    before = logger.level, list(logger.handlers)
    with pytest.raises(ValueError, match="stop"), stage_log(tmp_path / "a.log"):
        raise ValueError("stop")
    assert (logger.level, logger.handlers) == before
