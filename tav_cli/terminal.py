"""What the commands show: data on standard output; messages and bars on standard error."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from tav.runtime.progress import Progress, clock, is_quiet, rate

PIPED_WIDTH = 200  # where there is no terminal to ask
VALUES_FROM = 100  # columns of a terminal that has room for a loop's values, such as the loss


def output_console() -> Console:
    """Standard output; as wide as the terminal, or wide enough for most tables where it is piped."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=PIPED_WIDTH)
    return console


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def say(message: str) -> None:
    """A line on standard error, unless the user wants quiet."""
    if not is_quiet():
        print(message, file=sys.stderr, flush=True)


def complain(message: str, kind: str = "error") -> None:
    """What has gone wrong, in a line on standard error, always."""
    print(f"{kind}: {message}", file=sys.stderr, flush=True)


class Bars:
    """One bar for each loop that runs now, below what has been said; a `tav.runtime.progress.Display`.

    Without a terminal, or where the user wants quiet, there are none; see `are_wanted`.
    """

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        columns: list[ProgressColumn] = [
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[count]}"),
            _Pace(),
        ]
        if self.console.width >= VALUES_FROM:
            columns.append(TextColumn("{task.fields[values]}", style="dim"))
        # Lines on standard error go above the bars by themselves; those on standard output by `output`.
        self._rich = RichProgress(*columns, console=self.console, transient=True, expand=True, redirect_stdout=False)
        self._tasks: dict[str, Any] = {}
        self._working: set[str] = set()

    @property
    def are_wanted(self) -> bool:
        return self.console.is_terminal and not is_quiet()

    def __enter__(self) -> Bars:
        if self.are_wanted:
            self._rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._rich.live.is_started:
            self._rich.stop()

    def output(self, line: str) -> None:
        """A line on standard output, now."""
        is_live = self._rich.live.is_started
        if is_live:
            self._rich.stop()
        print(line, flush=True)
        if is_live:
            self._rich.start()

    @contextlib.contextmanager
    def working(self, title: str) -> Iterator[None]:
        """Something goes on under this title, before, after or without a loop that counts."""
        self.work(title)
        try:
            yield
        finally:
            self.rest(title)

    def work(self, title: str, what: str = "") -> None:
        self._working.add(title)
        self._replace(title, total=None, count=what, unit="", values="")

    def rest(self, title: str) -> None:
        self._working.discard(title)
        self._remove(title)

    # Of `Display`

    def begin(self, progress: Progress) -> None:
        self._replace(
            progress.title, total=progress.total, completed=progress.done, unit=progress.unit, **_fields(progress)
        )

    def update(self, progress: Progress) -> None:
        self._rich.update(
            self._tasks[progress.title], completed=progress.done, total=progress.total, **_fields(progress)
        )

    def end(self, progress: Progress) -> None:
        if progress.title in self._working:
            self.work(progress.title, "finishing")
        else:
            self._remove(progress.title)

    def _replace(self, title: str, **settings: Any) -> None:
        self._remove(title)
        self._tasks[title] = self._rich.add_task(title, **settings)

    def _remove(self, title: str) -> None:
        if title in self._tasks:
            self._rich.remove_task(self._tasks.pop(title))


class _Pace(ProgressColumn):
    """`3.20 step/s, 1:28 left`."""

    def render(self, task: Task) -> Text:
        parts = [rate(task.speed, 1, task.fields["unit"]) if task.speed else ""]
        if task.time_remaining is not None:
            parts.append(f"{clock(task.time_remaining)} left")
        if not task.total:
            parts.append(clock(task.elapsed or 0))
        return Text(", ".join(part for part in parts if part))


def _fields(progress: Progress) -> dict[str, Any]:
    return {"count": progress.count(), "values": progress.shown_values()}
