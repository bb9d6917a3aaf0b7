"""What Prefect's pages show of a run: how far it is, the scores, the contact sheet, and where MLflow has the rest."""

from __future__ import annotations

import os
import re
import time
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

SECONDS = 2.0


class ProgressArtifact:
    """A progress artifact of the task run that works now; called as `tav.runtime.progress.Progress` calls its `on_update`.

    Args:
        what: such as "tune ball"; the artifact is called so.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._artifact: UUID | None = None
        self._next = 0.0

    def __call__(self, done: int, total: int, values: dict[str, Any]) -> None:
        now = time.monotonic()
        if not total or (now < self._next and done < total):
            return
        self._next = now + SECONDS
        share = 100 * done / total
        # A server that is away for a moment must not end the work.
        if self._artifact is None:
            self._artifact = _tried(lambda: create_progress_artifact(share, _key("progress", self.what), self.what))
        else:
            artifact = self._artifact
            _tried(lambda: update_progress_artifact(artifact, share))


def publish_results(clip: str, root: Path) -> None:
    """The scores of a clip as a table; and where MLflow has an address, its run and the contact sheet."""
    stages = ClipStages(root, clip)
    scores = read_scores(Project(root).scores(clip))
    rows = [{"edit": name} | {metric: round(value, 4) for metric, value in row.items()} for name, row in scores.items()]
    _tried(lambda: create_table_artifact(rows, _key("scores", clip), f"The edits of {clip}"))

    address = mlflow_address(stages.params.tracking.uri)
    found = stages.runs.find() if address else None
    if found is None:
        return
    experiment, run = found
    page = f"{address}/#/experiments/{experiment}/runs/{run}"
    sheet = f"{address}/get-artifact?path=contact-sheet.png&run_uuid={run}"
    _tried(lambda: create_link_artifact(page, f"{clip} in MLflow", _key("mlflow", clip), "Parameters, curves, videos"))
    _tried(lambda: create_image_artifact(sheet, _key("contact-sheet", clip), f"The source and the edits of {clip}"))


def mlflow_address(uri: str | None) -> str | None:
    """Where a browser finds MLflow: the tracking server itself, or the one that `flows.services` has started."""
    parts = urlsplit(uri or "")
    if parts.scheme in ("http", "https"):
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")  # without a password
    return os.environ.get("TAV_MLFLOW_URL")


def _tried(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except Exception as error:
        get_run_logger().warning("an artifact is missing on this page: %s", error)
        return None


def _key(*words: str) -> str:
    """Prefect takes lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")
