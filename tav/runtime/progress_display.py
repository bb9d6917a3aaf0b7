"""Subscribers that show how far loops are: as lines in a file or on standard error, or as bars on a terminal."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, TextIO

from tav.runtime.events import Event, LoopEnded, LoopEvent, LoopProgressed, LoopResumed, LoopStarted, Subscriber
from tav.runtime.progress import clock, count_text, rate, values_text
from tav_model.errors import first_line

if TYPE_CHECKING:
    from tqdm import tqdm

STDERR_SECONDS = 10.0
LOG_SECONDS = 5.0


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
    """When and at what count a loop began here, and when its last line was written."""

    began: float
    first: int
    at: float
    done: int


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
                self._loops[event.title] = _Loop(event.time, event.done, event.time, event.done)
                if event.total != 0:
                    self._write(event, f"starts, {count_text(event)}")
            case LoopResumed():
                self._loops[event.title] = _Loop(event.time, event.done, event.time, event.done)
                if event.done:
                    self._write(event, f"resumes at {count_text(event)}")
            case LoopProgressed():
                self._progressed(event)
            case LoopEnded():
                self._ended(event)

    def _progressed(self, event: LoopProgressed) -> None:
        loop = self._loops[event.title]
        seconds, done = event.time - loop.at, event.done - loop.done
        if seconds < self.interval:
            return
        parts = [count_text(event), rate(done, seconds, event.unit)]
        if event.total is not None and done > 0:
            parts.append(f"{clock((event.total - event.done) * seconds / done)} left")
        parts.append(values_text(event.values))
        self._write(event, ", ".join(filter(None, parts)))
        loop.at, loop.done = event.time, event.done

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
            reason = type(event.error).__name__
            if str(event.error).strip():
                reason += f": {first_line(event.error)}"
            self._write(event, f"{how} at {count_text(event)} after {clock(seconds)}, {reason}")

    def _write(self, event: Event, text: str) -> None:
        stamp = datetime.now().astimezone().isoformat(timespec="milliseconds") + " " if self.stamped else ""
        with contextlib.suppress(*([OSError] if self.stamped else [])):
            self.stream.write(f"{stamp}{event.title}: {text}\n")
            self.stream.flush()


class ProgressBars:
    """Draw a bar on standard error for each loop that runs."""

    def __init__(self) -> None:
        self._bars: dict[str, tqdm[None]] = {}

    def __call__(self, event: Event) -> None:
        """Draw what an event changes."""
        if not isinstance(event, LoopEvent) or event.row is not None:
            return
        match event:
            case LoopStarted():
                from tqdm import tqdm

                self._bars[event.title] = tqdm(
                    desc=event.title, total=event.total, unit=event.unit, file=sys.stderr, dynamic_ncols=True
                )
            case LoopResumed():
                bar = self._bars[event.title]
                bar.reset()
                bar.n = bar.last_print_n = bar.initial = event.done
                bar.refresh()
            case LoopProgressed():
                bar = self._bars[event.title]
                bar.total = event.total
                bar.set_postfix_str(values_text(event.values), refresh=False)
                bar.update(event.done - bar.n)
            case LoopEnded():
                self._bars.pop(event.title).close()
