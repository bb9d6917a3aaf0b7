"""What is sent to MLflow's store: entries, each with some content for one run.

Entries are plain JSON values, so that they can wait in the outbox. Delivering one twice does no harm.
"""

from __future__ import annotations

import time
from typing import Literal, TypeAlias, TypedDict

EndStatus: TypeAlias = Literal["FINISHED", "FAILED", "KILLED"]
# name, value, step (None for a result, which a later value replaces), time in milliseconds
MetricPoint: TypeAlias = tuple[str, float, int | None, int]

CONTENT = ("params", "tags", "metrics", "artifact", "status")


class RunIdentity(TypedDict):
    """How processes find each other's runs: a digest `key` in the tag `tav.key`, and what is needed to create the run."""

    key: str
    kind: str
    clip: str
    name: str
    parent: RunIdentity | None


class Content(TypedDict, total=False):
    """The content of an entry.

    Attributes:
        artifact: an absolute path or one relative to the project's root, and the artifact folder (None for the top).
    """

    params: dict[str, str]
    tags: dict[str, str]
    metrics: list[MetricPoint]
    artifact: tuple[str, str | None]
    status: Literal["RUNNING"] | EndStatus


class Entry(Content):
    """Content for one run of one store.

    Attributes:
        store: the store's label, see `tav.tracking.store.Store`.
        run: the run that the content belongs to.
        time: when it was logged, in milliseconds since 1970.
    """

    store: str
    run: RunIdentity
    time: int


def describe(entry: Entry) -> str:
    """Return what an entry holds and for which run, for messages: `params, tags of 'ball · first,former'`."""
    return f"{', '.join(kind for kind in CONTENT if kind in entry)} of {entry['run']['name']!r}"


def milliseconds() -> int:
    """Return the current time in milliseconds since 1970, as MLflow counts it."""
    return time.time_ns() // 1_000_000
