"""One stream of events about running stages; terminals, log files, Prefect's pages and MLflow subscribe to it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tav.config.prompts import EditRow


class Stopped(BaseException):
    """The run was asked to stop; raised where a loop next publishes an event.

    Like `KeyboardInterrupt`, it is no `Exception`, so that nothing takes it for the failure of a stage or a row.
    """


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened while a stage of a clip ran.

    Attributes:
        row: the name of the row of the prompt CSV, for events about a single row.
        time: of a monotonic clock, in seconds.
    """

    clip: str
    stage: str
    row: str | None = None
    time: float = field(default_factory=lambda: time.monotonic())

    @property
    def title(self) -> str:
        """The stage and the clip, as people read them: `tune ball`."""
        return f"{self.stage} {self.clip}".strip()


@dataclass(frozen=True, kw_only=True)
class StageStarted(Event):
    """A stage begins: its inputs and models are loaded next."""


@dataclass(frozen=True, kw_only=True)
class StageUpToDate(Event):
    """A stage is not run: dvc.lock says that its outputs belong to its inputs."""


@dataclass(frozen=True, kw_only=True)
class StageRestored(Event):
    """A stage is not run: its outputs came back from DVC's cache."""


@dataclass(frozen=True, kw_only=True)
class StageFinished(Event):
    """A stage has left its outputs, after `seconds`."""

    seconds: float


@dataclass(frozen=True, kw_only=True)
class StageFailed(Event):
    """A stage has ended without its outputs: by a failure, or by an interruption."""

    error: BaseException


@dataclass(frozen=True, kw_only=True)
class ClipFinished(Event):
    """All stages of a clip are up to date, or `error` says in one line why they are not."""

    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class LoopEvent(Event):
    """The progress of a loop.

    Attributes:
        done: iterations that are done, including those before a resumption.
        total: how many iterations there are; None if that is unknown.
        unit: what is counted, in the singular.
        values: the latest value of each quantity that the loop reports, such as the loss.
    """

    done: int
    total: int | None
    unit: str
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LoopStarted(LoopEvent):
    """A loop begins."""


@dataclass(frozen=True, kw_only=True)
class LoopResumed(LoopEvent):
    """A loop resumes where another process or attempt has left it.

    Attributes:
        records: what the earlier iterations measured, as far as it is known.
    """

    records: Sequence[Any] = ()


@dataclass(frozen=True, kw_only=True)
class LoopProgressed(LoopEvent):
    """A loop has advanced; `record` holds everything that a tuning step measured."""

    record: Any = None


@dataclass(frozen=True, kw_only=True)
class LoopEnded(LoopEvent):
    """A loop has ended; `error` is None if it is complete."""

    error: BaseException | None = None


@dataclass(frozen=True, kw_only=True)
class RowFinished(Event):
    """A row of the prompt CSV was rendered."""

    edit: EditRow


Subscriber = Callable[[Event], None]


class EventStream:
    """Pass each published event on to all subscribers, in the thread that published it.

    An exception of a subscriber reaches the publisher.
    """

    def __init__(self, *subscribers: Subscriber) -> None:
        self._subscribers = subscribers
        self._mutex = threading.Lock()
        self._is_stopped = threading.Event()

    @contextlib.contextmanager
    def subscribed(self, *subscribers: Subscriber) -> Iterator[None]:
        """Let `subscribers` receive the events published within the `with` block."""
        with self._mutex:
            self._subscribers += subscribers
        try:
            yield
        finally:
            with self._mutex:
                self._subscribers = tuple(one for one in self._subscribers if one not in subscribers)

    def publish(self, event: Event) -> None:
        """Pass an event on.

        Raises:
            Stopped: `stop` was called, and the event is one of work that would continue.
        """
        if isinstance(event, StageStarted | LoopStarted | LoopProgressed):
            self.check()
        for subscriber in self._subscribers:
            subscriber(event)

    def check(self) -> None:
        """Raise `Stopped` where `stop` was called."""
        if self._is_stopped.is_set():
            raise Stopped

    def stop(self) -> None:
        """End the running loops where they next publish an event; checkpoints written so far are kept."""
        self._is_stopped.set()
