"""Subscribers that show how far loops are: as lines in a file or on standard error, or as bars on a terminal."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, TextIO

from tav.runtime.events import (
    Event,
    LoopEnded,
    LoopEvent,
    LoopProgressed,
    LoopResumed,
    LoopStarted,
    Stopped,
    Subscriber,
)
from tav.runtime.progress import Pace, clock, count_text, rate, values_text
from tav_model.errors import first_line

if TYPE_CHECKING:
    from tqdm import tqdm

STDERR_SECONDS = 10.0
LOG_SECONDS = 5.0
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"  # as tqdm fills it in


def time_stamp(seconds: float) -> str:
    """Return a time, in seconds since 1970, as log files have it: `2026-11-27T15:19:02.252+00:00`."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="milliseconds")


def is_quiet() -> bool:
    """Return whether the user wants standard error for errors only: TAV_QUIET=1 in the environment."""
    return os.environ.get("TAV_QUIET", "0") not in ("", "0")


def standard_error_display() -> list[Subscriber]:
    """Return what shows loops on standard error: bars on a terminal, lines elsewhere, nothing where it is to be quiet."""
    if is_quiet():
        return []
    return [ProgressBars()] if sys.stderr.isatty() else [ProgressLines(sys.stderr, STDERR_SECONDS)]


@dataclass
class _Loop:
    """When and at what count a loop began here, when its last line was written, and its pace."""

    began: float
    first: int
    written: float
    pace: Pace

    @classmethod
    def at(cls, event: LoopEvent) -> _Loop:
        return cls(event.time, event.done, event.time, Pace(event))


class ProgressLines:
    """Write lines: where a loop starts, about every `interval` seconds, and where it ends or fails.

    Args:
        stamped: begin each line with the time, and let no error of the stream end the work: what cannot be written
            next reports that the disk is full.
    """

    def __init__(self, stream: TextIO, interval: float, stamped: bool = False) -> None:
        self.stream, self.interval, self.stamped = stream, interval, stamped
        self._loops: dict[str, _Loop] = {}

    def __call__(self, event: Event) -> None:
        """Write what an event is worth; events about single rows are part of their stage's loop."""
        if not isinstance(event, LoopEvent) or event.row is not None:
            return
        match event:
            case LoopStarted():
                self._loops[event.title] = _Loop.at(event)
                if event.total != 0:
                    self._write(event, f"starts, {count_text(event)}")
            case LoopResumed():
                self._loops[event.title] = _Loop.at(event)
                if event.done:
                    self._write(event, f"resumes at {count_text(event)}")
            case LoopProgressed():
                self._progressed(event)
            case LoopEnded():
                self._ended(event)

    def _progressed(self, event: LoopProgressed) -> None:
        loop = self._loops[event.title]
        loop.pace.update(event)
        if event.time - loop.written < self.interval:
            return
        self._write(
            event, ", ".join(filter(None, [count_text(event), loop.pace.text(event), values_text(event.values)]))
        )
        loop.written = event.time

    def _ended(self, event: LoopEnded) -> None:
        loop = self._loops.pop(event.title)
        seconds = event.time - loop.began
        if event.error is None and event.total == 0:
            self._write(event, "nothing to do")
        elif event.error is None:
            done = rate(event.done - loop.first, seconds, event.unit)
            parts = [f"done, {count_text(event)} in {clock(seconds)}", done, values_text(event.values)]
            self._write(event, ", ".join(filter(None, parts)))
        else:
            how = "failed" if isinstance(event.error, Exception) else "stopped"
            text = f"{how} at {count_text(event)} after {clock(seconds)}"
            if not isinstance(event.error, KeyboardInterrupt | Stopped):
                text += f", {type(event.error).__name__}"
            if str(event.error).strip():
                text += f": {first_line(event.error)}"
            self._write(event, text)

    def _write(self, event: Event, text: str) -> None:
        stamp = time_stamp(time.time()) + " " if self.stamped else ""
        with contextlib.suppress(*([OSError] if self.stamped else [])):
            self.stream.write(f"{stamp}{event.title}: {text}\n")
            self.stream.flush()


class ProgressBars:
    """Draw a bar on standard error for each loop that runs and has something to do."""

    def __init__(self) -> None:
        self._bars: dict[str, tuple[tqdm[None], Pace]] = {}

    def __call__(self, event: Event) -> None:
        """Draw what an event changes."""
        if not isinstance(event, LoopEvent) or event.row is not None:
            return
        match event:
            case LoopStarted() if event.total != 0:
                self._start(event)
            case LoopResumed():
                self._close(event, leave=False)
                self._start(event)
            case LoopProgressed():
                if event.title not in self._bars:
                    self._start(event)
                bar, pace = self._bars[event.title]
                pace.update(event)
                bar.total = event.total
                about = filter(None, [pace.text(event), values_text(event.values)])
                bar.set_postfix_str(", ".join(about), refresh=False)
                bar.update(event.done - bar.n)
            case LoopEnded():
                self._close(event)

    def _start(self, event: LoopEvent) -> None:
        from tqdm import tqdm

        bar = tqdm(
            desc=event.title,
            total=event.total,
            initial=event.done,
            bar_format=BAR,
            file=sys.stderr,
            dynamic_ncols=True,
        )
        self._bars[event.title] = bar, Pace(event)

    def _close(self, event: LoopEvent, leave: bool = True) -> None:
        if event.title in self._bars:
            bar, _ = self._bars.pop(event.title)
            bar.leave = leave
            bar.close()
