"""Entries that did not reach their store, kept in `.tav/tracking-missed.jsonl` until a process reaches it.

Copies of their artifacts wait in `.tav/tracking-missed/`, because the originals may be gone by then.
"""

from __future__ import annotations

import json
import logging
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from tav.runtime.locks import waiting_lock
from tav.tracking.entries import Entry, describe
from tav.tracking.store import RejectedError, root_cause
from tav_model.files import write_text

logger = logging.getLogger(__name__)

MAX_FAILURES = 3  # after so many failed deliveries, a replay leaves the rest for the next one


class Outbox:
    """The undelivered entries of a project, for all stores. Processes take turns by a lock.

    Args:
        root: the project's root.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root / ".tav" / "tracking-missed.jsonl"
        self._copies = self.path.with_suffix("")
        self._lock_file = root / ".tav" / "tracking-missed.lock"

    def append(self, entry: Entry) -> bool:
        """Keep an entry, with a copy of its artifact or model.

        Returns:
            Whether it was kept: the disk may be full, or the file missing.
        """
        try:
            if "artifact" in entry:
                path, folder = entry["artifact"]
                entry = entry | {"artifact": (self._copy(path), folder)}
            if "model" in entry and entry["model"]["path"] is not None:
                entry = entry | {"model": entry["model"] | {"path": self._copy(entry["model"]["path"])}}
            with waiting_lock(self._lock_file), self.path.open("a", encoding="utf-8") as file:
                # If a killed process has left half a line, the newline in front separates this one from it.
                file.write(f"\n{json.dumps(entry)}\n")
        except OSError:
            return False
        return True

    def _copy(self, path: str) -> str:
        """Copy a file or a folder to where it can wait, and return its path relative to the project's root."""
        copy = self._copies / uuid.uuid4().hex / Path(path).name
        copy.parent.mkdir(parents=True)
        (shutil.copytree if Path(path).is_dir() else shutil.copyfile)(path, copy)
        return copy.relative_to(self.root).as_posix()

    def replay(self, label: str, uri: str, deliver: Callable[[Entry], None]) -> None:
        """Deliver the entries of one store in order, and keep those that fail and those of other stores.

        Args:
            label: of the store.
            uri: of the store, to keep its secrets out of messages.
            deliver: as `tav.tracking.store.Store.deliver`.
        """
        with waiting_lock(self._lock_file):
            if not self.path.exists():
                return
            kept: list[str] = []
            sent = failures = 0
            for line in filter(None, self.path.read_text(encoding="utf-8", errors="replace").splitlines()):
                entry = self._parse(line)
                if entry is None:
                    continue
                if entry["store"] != label or failures >= MAX_FAILURES:
                    kept.append(line)
                    continue
                try:
                    deliver(entry)
                    sent += 1
                except RejectedError as error:
                    logger.warning("tracking: dropped %s: %s", describe(entry), error)
                except Exception as error:
                    logger.warning("tracking: %s not sent: %s", describe(entry), root_cause(error, uri))
                    kept.append(line)
                    failures += 1
                    continue
                self._remove_copy(entry)
            if kept:
                write_text(self.path, "\n".join(kept) + "\n")
            else:
                self.path.unlink(missing_ok=True)
            logger.info("tracking: sent %d entries kept from before, %d remain", sent, len(kept))

    def _parse(self, line: str) -> Entry | None:
        try:
            entry: Entry = json.loads(line)
            entry["store"]
        except (ValueError, TypeError, KeyError):
            logger.warning("tracking: %s: dropped an incomplete line", self.path.name)
            return None
        return entry

    def _remove_copy(self, entry: Entry) -> None:
        path = entry["artifact"][0] if "artifact" in entry else entry["model"]["path"] if "model" in entry else None
        if path is not None:
            copy = self.root / path
            if copy.parent.parent == self._copies:
                shutil.rmtree(copy.parent, ignore_errors=True)
