"""Progress of long loops: a bar for people, lines for logs; and where a stage's log records go."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from tav_model.disk_space import explained_full_disk
from tav_model.errors import FullDiskError, TavError

if TYPE_CHECKING:
    from tqdm import tqdm

STDERR_SECONDS = 10.0
LOG_SECONDS = 5.0
STAMP = "%Y-%m-%dT%H:%M:%S%z"


@dataclass
class _Lines:
    """Where lines go, and when and at what count the last one went there."""

    stream: TextIO
    interval: float
    stamped: bool
    at: float
    done: int

    def write(self, text: str, now: float, done: int) -> None:
        stamp = datetime.now().astimezone().isoformat(timespec="milliseconds") + " " if self.stamped else ""
        # A log that finds no room ends no work; what cannot be written next says that the disk is full.
        with contextlib.suppress(*([OSError] if self.stamped else [])):
            self.stream.write(f"{stamp}{text}\n")
            self.stream.flush()
        self.at, self.done = now, done


class Display(Protocol):
    """Where a program of several stages draws the bars itself; see `display_on`."""

    def begin(self, progress: Progress) -> None: ...

    def update(self, progress: Progress) -> None: ...

    def end(self, progress: Progress) -> None: ...


_display: Display | None = None


@contextlib.contextmanager
def display_on(display: Display) -> Iterator[None]:
    """Meanwhile, every `Progress` of this process is shown there and not on stderr. Log files are as always."""
    global _display
    before, _display = _display, display
    try:
        yield
    finally:
        _display = before


class Progress:
    """How far a loop is: a bar on a terminal, else a line on stderr about every 10 s; and lines in a log file.

    ``with Progress("tune ball", total=300, unit="step") as progress: progress.update(loss=0.12)``

    TAV_QUIET=1 in the environment keeps stderr empty; the log file is written all the same.

    Args:
        total: how many updates there will be, where that is known. May be set later.
        unit: what is counted, in the singular.
        log: a file to append to, with a time on each line: start, at most one line in 5 s, and the end or failure.
        on_update: called after each update with the number done, `total` (0: unknown) and the values. What it raises
            ends the loop.

    Raises:
        TavError: the log file cannot be written.
    """

    def __init__(
        self,
        title: str,
        total: int | None = None,
        unit: str = "step",
        log: Path | None = None,
        on_update: Callable[[int, int, dict[str, Any]], None] | None = None,
    ) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, 0
        self._log, self._on_update = log, on_update
        self._before = 0
        self._values: dict[str, Any] = {}
        self._lines: list[_Lines] = []
        self._bar: tqdm | None = None
        self._display: Display | None = None

    def __enter__(self) -> Progress:
        self._start = now = time.monotonic()
        if self._log is not None:
            self._lines.append(_Lines(_open_log(self._log), LOG_SECONDS, True, now, self.done))
        if _display is not None:
            self._display = _display
            self._display.begin(self)
        elif not is_quiet():
            if sys.stderr.isatty():
                from tqdm import tqdm

                self._bar = tqdm(
                    desc=self.title,
                    total=self.total,
                    unit=self.unit,
                    file=sys.stderr,
                    dynamic_ncols=True,
                )
            else:
                self._lines.append(_Lines(sys.stderr, STDERR_SECONDS, False, now, self.done))
        self._say(f"{self.title}: starts, {self.count()}", now)
        return self

    def go_on_at(self, done: int) -> None:
        """Count from `done` on: so many were done before, by another process or attempt; rates leave them out."""
        self.done = self._before = done
        self._start = now = time.monotonic()
        if self._bar is not None:
            self._bar.reset()
            self._bar.n = self._bar.last_print_n = self._bar.initial = done
            self._bar.refresh()
        if self._display is not None:
            self._display.begin(self)
        for lines in self._lines:
            lines.at, lines.done = now, done
        if done:
            self._say(f"{self.title}: goes on at {self.count()}", now)
        if self._on_update is not None:
            self._on_update(done, self.total or 0, {})

    def update(self, n: int = 1, **values: Any) -> None:
        """Count `n` more, and show `values` (the latest of each name)."""
        self.done += n
        self._values |= values
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.set_postfix_str(self.shown_values(), refresh=False)
            self._bar.update(n)
        if self._display is not None:
            self._display.update(self)
        now = time.monotonic()
        for lines in self._lines:
            if now - lines.at >= lines.interval:
                lines.write(self._state(now - lines.at, self.done - lines.done), now, self.done)
        if self._on_update is not None:
            self._on_update(self.done, self.total or 0, dict(self._values))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._display is not None:
            self._display.end(self)
        now = time.monotonic()
        seconds = now - self._start
        if error is None:
            parts = [f"done, {self.count()} in {clock(seconds)}"]
            parts += [rate(self.done - self._before, seconds, self.unit), self.shown_values()]
        else:
            parts = ["failed" if isinstance(error, Exception) else "stopped"]
            parts[0] += f" at {self.count()} after {clock(seconds)}"
            parts.append(": ".join(filter(None, [type(error).__name__, str(error).strip().partition("\n")[0]])))
        self._say(f"{self.title}: {', '.join(part for part in parts if part)}", now)
        if self._log is not None:
            _close_log(self._lines[0].stream)
        self._lines.clear()

    def _say(self, text: str, now: float) -> None:
        for lines in self._lines:
            lines.write(text, now, self.done)

    def _state(self, seconds: float, done: int) -> str:
        parts = [f"{self.title}: {self.count()}", rate(done, seconds, self.unit)]
        if self.total is not None and done > 0:
            parts.append(f"{clock((self.total - self.done) * seconds / done)} left")
        parts.append(self.shown_values())
        return ", ".join(part for part in parts if part)

    def count(self) -> str:
        """How far it is: `120/400 steps`."""
        if self.total is None:
            return f"{self.done} {self.unit}{'' if self.done == 1 else 's'}"
        return f"{self.done}/{self.total} {self.unit}{'' if self.total == 1 else 's'}"

    def shown_values(self) -> str:
        """The values of the last update: `loss 0.1234`."""
        return ", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in self._values.items()
        )


def is_quiet() -> bool:
    """Whether stderr is for errors only: TAV_QUIET=1 in the environment."""
    return os.environ.get("TAV_QUIET", "0") not in ("", "0")


@contextlib.contextmanager
def stage_log(path: Path) -> Iterator[None]:
    """Meanwhile, append what the project's modules log (INFO and above, with tracebacks) to the file `path`.

    stderr gets warnings and errors, a line each and around a progress bar, unless the root logger has handlers.

    Raises:
        TavError: the file cannot be written.
    """
    stream = _open_log(path)
    to_file = _LogFile(stream)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", STAMP))
    handlers: list[logging.Handler] = [to_file]
    if not logging.getLogger().handlers:
        handlers.append(_StderrLines(logging.WARNING))
    loggers = [logging.getLogger(name) for name in ("flows", "tasks", "toyworld", "tav_model")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        for handler in handlers:
            logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
            for handler in handlers:
                logger.removeHandler(handler)
        _close_log(stream)


class _LogFile(logging.StreamHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # Else there is no room; see _Lines.
            super().handleError(record)


class _StderrLines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


def _open_log(path: Path) -> TextIO:
    try:
        with explained_full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("a", encoding="utf-8")
    except FullDiskError:
        raise
    except OSError as error:
        raise TavError(f"{path}: the log cannot be written ({error.strerror})") from None


def _close_log(stream: TextIO) -> None:
    with contextlib.suppress(OSError):
        stream.close()


def clock(seconds: float) -> str:
    """`0:07`, `12:03`, `1:00:00`."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def rate(done: float, seconds: float, unit: str) -> str:
    """`3.20 step/s`, or `1.50 s/step` where it is slower; nothing where there is nothing to say."""
    if done <= 0 or seconds <= 0:
        return ""
    return f"{done / seconds:.2f} {unit}/s" if done >= seconds else f"{seconds / done:.2f} s/{unit}"
