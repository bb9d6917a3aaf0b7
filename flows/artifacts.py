"""Artifacts on Prefect's pages: how far a run is, its scores, its contact sheet, and a link to its MLflow run."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from tasks.clip_stages import ClipStages
from tav.config.paths import Project
from tav.config.results import read_scores
from tav.runtime.events import Event, LoopProgressed

SECONDS = 2.0


class ProgressArtifacts:
    """Show how far loops are as progress artifacts, on the page of the task run that works; a subscriber of events.

    The rows of a prompt CSV have artifacts of their own in place of one for their stage.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._artifacts: dict[str, _ProgressArtifact] = {}

    def __call__(self, event: Event) -> None:
        """Update the artifact of a loop, at most every few seconds."""
        if not isinstance(event, LoopProgressed) or not event.total or (event.stage == "edit" and event.row is None):
            return
        what = event.title if event.row is None else f"{event.clip} {event.row}"
        with self._mutex:
            artifact = self._artifacts.setdefault(what, _ProgressArtifact(what))
        artifact.update(100 * event.done / event.total, event.time)


class _ProgressArtifact:
    def __init__(self, what: str) -> None:
        self.what, self._next = what, 0.0
        self._id: UUID | None = None

    def update(self, percentage: float, now: float) -> None:
        if now < self._next and percentage < 100:
            return
        self._next = now + SECONDS
        # A server that is away for a moment must not end the work.
        if self._id is None:
            self._id = _attempt(lambda: create_progress_artifact(percentage, _key("progress", self.what), self.what))
        else:
            artifact = self._id
            _attempt(lambda: update_progress_artifact(artifact, percentage))


def publish_results(clip: str, root: Path) -> None:
    """Show the scores of a clip as a table and, where MLflow has an address, its run and the contact sheet."""
    stages = ClipStages(root, clip)
    scores = read_scores(Project(root).scores(clip))
    rows = [{"edit": name} | {metric: round(value, 4) for metric, value in row.items()} for name, row in scores.items()]
    _attempt(lambda: create_table_artifact(rows, _key("scores", clip), f"The edits of {clip}"))

    address = mlflow_address(stages.params.tracking.uri)
    found = stages.runs.find() if address else None
    if found is None:
        return
    experiment, run = found
    page = f"{address}/#/experiments/{experiment}/runs/{run}"
    sheet = f"{address}/get-artifact?path=contact-sheet.png&run_uuid={run}"
    _attempt(
        lambda: create_link_artifact(page, f"{clip} in MLflow", _key("mlflow", clip), "Parameters, curves, videos")
    )
    _attempt(lambda: create_image_artifact(sheet, _key("contact-sheet", clip), f"The source and the edits of {clip}"))


def mlflow_address(uri: str | None) -> str | None:
    """Return where a browser finds MLflow: the tracking server itself, or the one that `flows.services` started."""
    parts = urlsplit(uri or "")
    if parts.scheme in ("http", "https"):
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")  # without a password
    return os.environ.get("TAV_MLFLOW_URL")


def _attempt(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except Exception as error:
        get_run_logger().warning("an artifact is missing on this page: %s", error)
        return None


def _key(*words: str) -> str:
    """Return a key as Prefect allows it: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")
