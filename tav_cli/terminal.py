"""What the commands print: results on standard output; messages and progress bars on standard error."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from tav.runtime.events import Event, LoopEnded, LoopEvent, LoopProgressed, LoopResumed, LoopStarted
from tav.runtime.progress import Pace, clock, count_text, values_text
from tav.runtime.progress_display import is_quiet

PIPED_WIDTH = 200  # columns, where there is no terminal to ask
MIN_WIDTH_FOR_VALUES = 100  # columns of a terminal that has room for a loop's values, such as the loss


def output_console() -> Console:
    """Return a console on standard output, as wide as the terminal, or wide enough for most tables in a pipe."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=PIPED_WIDTH)
    return console


def print_json(value: Any) -> None:
    """Print a JSON document on standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_message(message: str) -> None:
    """Print a line on standard error, unless the user asked for quiet."""
    if not is_quiet():
        print(message, file=sys.stderr, flush=True)


def print_notice(message: str) -> None:
    """Print a line on standard error, even where the user asked for quiet."""
    print(message, file=sys.stderr, flush=True)


def print_error(message: str) -> None:
    """Print what failed, in one line on standard error."""
    print_notice(f"error: {message}")


class ProgressBars:
    """A progress bar for each running loop, below the messages; a subscriber of events.

    Without a terminal, or where the user asked for quiet, there are no bars; see `enabled`.
    """

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        columns: list[ProgressColumn] = [
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[count]}"),
            _PaceColumn(),
        ]
        if self.console.width >= MIN_WIDTH_FOR_VALUES:
            columns.append(TextColumn("{task.fields[values]}", style="dim"))
        # Lines on standard error go above the bars by themselves; those on standard output through `print_line`.
        self._rich = RichProgress(*columns, console=self.console, transient=True, expand=True, redirect_stdout=False)
        self._tasks: dict[str, Any] = {}
        self._paces: dict[str, Pace] = {}
        self._activities: set[str] = set()
        self._mutex = threading.RLock()  # Events come from the threads of several clips.

    @property
    def enabled(self) -> bool:
        """Whether bars are drawn."""
        return self.console.is_terminal and not is_quiet()

    def __enter__(self) -> ProgressBars:
        if self.enabled:
            self._rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._rich.live.is_started:
            self._rich.stop()

    def print_line(self, line: str) -> None:
        """Print a line on standard output at once, with the bars out of the way."""
        is_live = self._rich.live.is_started
        if is_live:
            self._rich.stop()
        print(line, flush=True)
        if is_live:
            self._rich.start()

    @contextlib.contextmanager
    def activity(self, title: str) -> Iterator[None]:
        """Show a pulsing bar with this title for work that is not counted, or not yet."""
        self.start_activity(title)
        try:
            yield
        finally:
            self.end_activity(title)

    def start_activity(self, title: str, detail: str = "") -> None:
        """Show a pulsing bar; a loop with the same title takes its place while it counts."""
        with self._mutex:
            self._activities.add(title)
            self._replace(title, total=None, count=detail, pace="", values="")

    def end_activity(self, title: str) -> None:
        """Remove the bar, if there is one."""
        with self._mutex:
            self._activities.discard(title)
            self._remove(title)

    def __call__(self, event: Event) -> None:
        """Show what an event changes; events about single rows are part of their stage's loop."""
        if not isinstance(event, LoopEvent) or event.row is not None:
            return
        with self._mutex:
            match event:
                case LoopStarted() | LoopResumed() if event.total != 0:
                    self._start_loop(event)
                case LoopProgressed():
                    if event.title not in self._paces:
                        self._start_loop(event)
                    self._paces[event.title].update(event)
                    self._rich.update(self._tasks[event.title], **self._fields(event))
                case LoopEnded() if event.title in self._activities:
                    self.start_activity(event.title, "finishing")
                case LoopEnded():
                    self._remove(event.title)

    def _start_loop(self, event: LoopEvent) -> None:
        self._remove(event.title)
        self._paces[event.title] = Pace(event)
        self._tasks[event.title] = self._rich.add_task(event.title, **self._fields(event))

    def _fields(self, event: LoopEvent) -> dict[str, Any]:
        return {
            "completed": event.done,
            "total": event.total,
            "count": count_text(event),
            "pace": self._paces[event.title].text(event),
            "values": values_text(event.values),
        }

    def _replace(self, title: str, **settings: Any) -> None:
        self._remove(title)
        self._tasks[title] = self._rich.add_task(title, **settings)

    def _remove(self, title: str) -> None:
        self._paces.pop(title, None)
        if title in self._tasks:
            self._rich.remove_task(self._tasks.pop(title))


class _PaceColumn(ProgressColumn):
    """The rate and the remaining time of a loop, such as `3.20 step/s, 1:28 left`; the elapsed time of an activity."""

    def render(self, task: Task) -> Text:
        parts = [task.fields["pace"], "" if task.total else clock(task.elapsed or 0)]
        return Text(", ".join(filter(None, parts)))
