"""The log file of a stage: the lines of its loops, and what the project's modules log meanwhile."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TextIO

from tav.runtime.events import Event, EventStream
from tav.runtime.progress_display import LOG_SECONDS, ProgressLines, time_stamp
from tav_model.disk_space import explained_full_disk
from tav_model.errors import FullDiskError, TavError

PACKAGES = ("tav_cli", "flows", "tasks", "tav", "toyworld", "tav_model")
# Stages of several clips run side by side in threads; each log takes the records of its own.
_log: ContextVar[Path | None] = ContextVar("log", default=None)


@contextlib.contextmanager
def stage_log(path: Path, events: EventStream | None = None, clip: str | None = None) -> Iterator[None]:
    """Append to the file `path` what happens within the `with` block.

    That is what the project's modules log in this context (INFO and above, with tracebacks), and a line for the
    progress of the clip's loops at most every 5 s. Standard error receives warnings and errors, one line each, without
    breaking a progress bar, unless the root logger has handlers.

    Raises:
        TavError: the file cannot be written.
        FullDiskError: the disk is full.
    """
    stream = _open(path)
    lines = ProgressLines(stream, LOG_SECONDS, stamped=True)

    def of_this_clip(event: Event) -> None:
        if event.clip == clip:
            lines(event)

    handlers: list[logging.Handler] = [_LogFile(stream)]
    handlers[0].setFormatter(_Stamped("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    if not logging.getLogger().handlers:
        handlers.append(_StandardError(logging.WARNING))
    try:
        with _records_to(handlers, path), events.subscribed(of_this_clip) if events else contextlib.nullcontext():
            yield
    finally:
        with contextlib.suppress(OSError):
            stream.close()


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Send the log records of this thread within the `with` block to an open stage log."""
    token = _log.set(path)
    try:
        yield
    finally:
        _log.reset(token)


@contextlib.contextmanager
def _records_to(handlers: list[logging.Handler], path: Path) -> Iterator[None]:
    for handler in handlers:
        # Records of threads that no stage has started belong to every open log.
        handler.addFilter(lambda record: _log.get() in (None, path))
    loggers = [logging.getLogger(name) for name in PACKAGES]
    _levels.enable_info(loggers)
    for logger in loggers:
        for handler in handlers:
            logger.addHandler(handler)
    try:
        with logging_to(path):
            yield
    finally:
        for logger in loggers:
            for handler in handlers:
                logger.removeHandler(handler)
        _levels.restore(loggers)


class _Levels:
    """Let loggers pass INFO while any log is open, and put their levels back when the last one closes."""

    def __init__(self) -> None:
        self._mutex, self._open_logs, self._before = threading.Lock(), 0, [logging.NOTSET]

    def enable_info(self, loggers: list[logging.Logger]) -> None:
        with self._mutex:
            if not self._open_logs:
                self._before = [logger.level for logger in loggers]
                for logger in loggers:
                    if logger.getEffectiveLevel() > logging.INFO:
                        logger.setLevel(logging.INFO)
            self._open_logs += 1

    def restore(self, loggers: list[logging.Logger]) -> None:
        with self._mutex:
            self._open_logs -= 1
            if not self._open_logs:
                for logger, level in zip(loggers, self._before, strict=True):
                    logger.setLevel(level)


_levels = _Levels()


class _Stamped(logging.Formatter):
    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802 (logging's own name)
        return time_stamp(record.created)


class _LogFile(logging.StreamHandler[TextIO]):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's own name)
        if not isinstance(sys.exc_info()[1], OSError):  # A full disk is reported by what is written next.
            super().handleError(record)


class _StandardError(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


def _open(path: Path) -> TextIO:
    try:
        with explained_full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("a", encoding="utf-8")
    except FullDiskError:
        raise
    except OSError as error:
        raise TavError(f"{path}: the log cannot be written ({error.strerror})") from None
