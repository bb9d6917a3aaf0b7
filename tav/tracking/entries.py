"""What is sent to MLflow's store: entries, each with some content for one run.

Entries are plain JSON values, so that they can wait in the outbox. Delivering one twice does no harm.
"""

from __future__ import annotations

import time
from typing import Literal, TypeAlias, TypedDict

EndStatus: TypeAlias = Literal["FINISHED", "FAILED", "KILLED"]
# name, value, step (None for a result, which a later value replaces), time in milliseconds
MetricPoint: TypeAlias = tuple[str, float, int | None, int]

CONTENT = ("params", "tags", "metrics", "dataset", "artifact", "model", "status")


class RunIdentity(TypedDict):
    """How processes find each other's runs: a digest `key` in the tag `tav.key`, and what is needed to create the run."""

    key: str
    kind: str
    clip: str
    name: str
    parent: RunIdentity | None


class Dataset(TypedDict):
    """The data that a run works on, as MLflow describes it.

    Attributes:
        digest: of the contents; at most 36 characters.
        source: where the data comes from, relative to the project.
        shape: of the tensor, in the order of the axes.
        profile: what else people see of it.
        context: what the run uses it for.
    """

    name: str
    digest: str
    source: str
    shape: list[int]
    dtype: str
    profile: dict[str, str | int]
    context: str


class Model(TypedDict):
    """A model that a run has made, or reuses.

    Attributes:
        identity: a digest of what it is made from.
        params: parameters to show beside it.
        path: the folder of the model, which is logged unless the store has it; None: it is only linked.
    """

    identity: str
    params: dict[str, str]
    path: str | None


class Content(TypedDict, total=False):
    """The content of an entry.

    Attributes:
        artifact: an absolute path or one relative to the project's root, and the artifact folder (None for the top).
    """

    params: dict[str, str]
    tags: dict[str, str]
    metrics: list[MetricPoint]
    dataset: Dataset
    model: Model
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
