"""What Prefect's pages and logs show beside the states: the result of each clip in one artifact, and how far loops are.

A run's page lists the artifacts of the flow before those of its tasks: the results lead, and the progress follows.
"""

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
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact

from tasks.clip_stages import ClipStages
from tav.config.metrics import HEADLINES
from tav.config.paths import Project
from tav.config.results import read_record, read_scores
from tav.runtime.events import Event, LoopProgressed
from tav.runtime.progress import clock, count_text, values_text
from tav.tracking.pages import run_page
from tav_model.files import read_json

SECONDS = 2.0
# Until the next attempt where the server does not answer: Prefect's client tries for half a minute, and the work waits for it.
AWAY_SECONDS = 300.0
LOG_SECONDS = 10.0
LOG_STEP = 25  # percentage points


class ProgressArtifacts:
    """Show how far loops are as progress artifacts, on the page of the task run that works; a subscriber of events.

    The rows of a prompt CSV have artifacts of their own in place of one for their stage. A server that is away for a moment
    must not end the work, nor hold it up: once it has not answered, no loop asks it for a while.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._artifacts: dict[str, _ProgressArtifact] = {}
        self._away_until = 0.0

    def __call__(self, event: Event) -> None:
        """Update the artifact of a loop, at most every few seconds."""
        if not isinstance(event, LoopProgressed) or not (total := _shown_total(event)) or event.time < self._away_until:
            return
        what = _title(event)
        with self._mutex:
            artifact = self._artifacts.setdefault(what, _ProgressArtifact(what))
        if not artifact.update(100 * event.done / total, event.time):
            self._away_until = event.time + AWAY_SECONDS


class _ProgressArtifact:
    def __init__(self, what: str) -> None:
        self.what, self._next = what, 0.0
        self._id: UUID | None = None

    def update(self, percentage: float, now: float) -> bool:
        """Show the percentage, unless the last one was shown a moment ago, and return whether the server answered."""
        if now < self._next and percentage < 100:
            return True
        self._next = now + SECONDS
        artifact = self._id
        if artifact is not None:
            return _attempt(lambda: update_progress_artifact(artifact, percentage)) is not None
        self._id = _attempt(lambda: create_progress_artifact(percentage, _key("progress", self.what), self.what))
        return self._id is not None


class ProgressLogs:
    """Log how far loops are, with the time that is left, in the log of the task run that works; a subscriber of events.

    A line at the end of each loop, and before that at most every 10 s, or where a quarter more is done.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._loops: dict[str, tuple[LoopProgressed, LoopProgressed]] = {}  # the first, and the last that was logged

    def __call__(self, event: Event) -> None:
        """Log an event if it is worth a line."""
        if not isinstance(event, LoopProgressed) or not (total := _shown_total(event)):
            return
        what, percentage = _title(event), 100 * event.done / total
        with self._mutex:
            first, last = self._loops.get(what, (event, event))
            has_advanced = percentage // LOG_STEP > 100 * last.done / total // LOG_STEP
            is_due = event.done == total or has_advanced or event.time >= last.time + LOG_SECONDS
            self._loops[what] = first, event if is_due else last
        if not is_due:
            return
        parts = [f"{what}: {percentage:.0f}%", count_text(event)]
        if first.done < event.done < total:
            left = (event.time - first.time) * (total - event.done) / (event.done - first.done)
            parts.append(f"{clock(left)} left")
        if event.values:
            parts.append(values_text(event.values))
        _attempt(lambda: get_run_logger().info(", ".join(parts)))


def _shown_total(event: LoopProgressed) -> int:
    """Return the total of a loop; 0 for one that is not shown. Rows are shown in place of the stage `edit`."""
    return 0 if event.total is None or (event.stage == "edit" and event.row is None) else event.total


def _title(event: LoopProgressed) -> str:
    return event.title if event.row is None else f"{event.title} {event.row}"


def publish_results(clip: str, root: Path) -> None:
    """Show a clip's result as one artifact: its contact sheet, its scores, and links to its report and its MLflow run."""
    key, text = _key("result", clip), result_text(clip, root)
    _attempt(lambda: create_markdown_artifact(text, key, f"Contact sheet, scores and report of {clip}"))


def result_text(clip: str, root: Path) -> str:
    """Return a clip's result as Markdown. Where MLflow has no address, it names files in place of picture and links."""
    stages = ClipStages(root, clip)
    project = Project(root)
    report, sheet, edits = (
        path.relative_to(root) for path in (project.report(clip), project.contact_sheet(clip), project.edits(clip))
    )
    parts = [f"# {clip}: {_escaped(stages.settings.caption)}"]
    address = mlflow_address(stages.params.tracking.uri)
    found = stages.runs.find() if address else None
    if address and found:
        picture = f"{address}/get-artifact?path={sheet.name}&run_uuid={found[1]}"
        parts.append(f"![The source and the edits of {clip}]({picture})")
        parts.append(
            f"[Report with the videos]({run_page(address, *found, report.name)}) · "
            f"[Run in MLflow]({run_page(address, *found)})"
        )
    parts.append(_score_table(project, clip))
    parts.append(f"Files: `{report}` (`tav report {clip} --open`), `{sheet}`, videos in `{edits}/`")
    return "\n\n".join(parts)


def _score_table(project: Project, clip: str) -> str:
    """Return the headline scores of the source, of each edit and on average, as a table in Markdown."""
    metrics = read_json(project.scores(clip) / "metrics.json")
    columns = [metric for metric in HEADLINES if metric.key in metrics["mean"]]
    rows = [("*source*", metrics["source"])]
    for name, values in read_scores(project.scores(clip)).items():
        prompt = read_record(project.edits(clip) / f"{name}.json").get("prompt", name)
        rows.append((_escaped(prompt), values))
    rows.append(("**mean**", metrics["mean"]))
    lines = [["edit", *(f"{metric.label} {'↑' if metric.higher_is_better else '↓'}" for metric in columns)]]
    lines.append(["---", *("---:" for _ in columns)])
    for label, values in rows:
        lines.append([label, *(metric.text(values[metric.key]) if metric.key in values else "" for metric in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    """Escape what Markdown and HTML would act on in a prompt or a caption."""
    return re.sub(r"[\\`*_\[\]<>|&]", lambda match: f"&#{ord(match[0])};", text)


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
