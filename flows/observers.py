"""Subscribers that the caller of the flow adds to its events, such as the progress bars of `tav run`.

They are in a module of their own because Ray's workers receive the flow with the objects of its module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from tav.runtime.events import Subscriber

_observers: ContextVar[tuple[Subscriber, ...]] = ContextVar("observers", default=())


@contextlib.contextmanager
def observed_by(*subscribers: Subscriber) -> Iterator[None]:
    """Let `subscribers` receive the events of flow runs that are called within the `with` block."""
    token = _observers.set(subscribers)
    try:
        yield
    finally:
        _observers.reset(token)


def observers() -> tuple[Subscriber, ...]:
    """Return the subscribers of flow runs that are called here."""
    return _observers.get()
