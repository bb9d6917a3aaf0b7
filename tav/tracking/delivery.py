"""Bring entries to the store, or to the outbox while the store does not answer."""

from __future__ import annotations

import contextlib
import logging
import threading
import time

from tav.runtime.redaction import redact
from tav.tracking.entries import Content, Entry, RunIdentity, describe, milliseconds
from tav.tracking.outbox import Outbox
from tav.tracking.store import RejectedError, Store, root_cause

logger = logging.getLogger(__name__)

RETRY_SECONDS = 60.0
# However long an unreachable store keeps its callers waiting, that costs at most 5 % of the time.
PAUSE_FACTOR = 20


class Delivery:
    """Sends entries from any thread, one at a time. A store that fails is not contacted again for a while.

    Args:
        store: where the entries go.
        outbox: where they wait while the store does not answer.
    """

    def __init__(self, store: Store, outbox: Outbox) -> None:
        self._store, self._outbox = store, outbox
        self._retry_at = 0.0  # by the monotonic clock
        self._mutex = threading.RLock()

    def send(self, run: RunIdentity, content: Content) -> None:
        """Deliver content for a run, or keep it for later. Failures are logged, not raised."""
        entry: Entry = {"store": self._store.label, "run": run, "time": milliseconds(), **content}
        with self._mutex:
            if time.monotonic() < self._retry_at:
                if not self._outbox.append(entry):
                    logger.warning("tracking: %s lost", describe(entry))
                return
            started = time.monotonic()
            try:
                self._connect()
                self._store.deliver(entry)
            except RejectedError as error:
                logger.warning("tracking: %s not logged: %s", describe(entry), error)
            except Exception as error:
                self._store.disconnect()
                now = time.monotonic()
                self._retry_at = now + max(RETRY_SECONDS, PAUSE_FACTOR * (now - started))
                is_kept = self._outbox.append(entry)
                path = self._outbox.path.relative_to(self._outbox.root)
                logger.warning(
                    "tracking: %s: %s; %s and later entries: %s",
                    redact(self._store.uri),
                    root_cause(error, self._store.uri),
                    describe(entry),
                    f"kept in {path} until the store answers" if is_kept else "lost",
                )

    def find(self, key: str) -> tuple[str, str] | None:
        """Return the ids of the experiment and of the run with this key; None if it or the store is not there."""
        with self._mutex, contextlib.suppress(Exception):
            self._connect()
            return self._store.find(key)
        return None

    def has_model(self, identity: str) -> bool:
        """Return whether the store has the model with this identity; False if the store does not answer."""
        with self._mutex, contextlib.suppress(Exception):
            self._connect()
            return self._store.find_model(identity) is not None
        return False

    def _connect(self) -> None:
        if not self._store.is_connected:
            self._store.connect()
            self._outbox.replay(self._store.label, self._store.uri, self._store.deliver)
