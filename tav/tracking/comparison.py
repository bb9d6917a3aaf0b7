"""The pipeline's MLflow runs side by side: which there are, what tells them apart, and which is best.

Reading leaves the store as it is: a SQLite file is copied and read as that copy, so that nothing is created beside it and
MLflow, which brings an older file up to its own version when it opens it, does so with the copy.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from tav.config import load_params
from tav.runtime.redaction import redact
from tav.tracking.store import ENVIRONMENT, project_root, resolve_uri
from tav_model.errors import TavError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

# Every score of an edit, whether more of it is better, in the order of columns; see tasks.score for what each is.
HIGHER_IS_BETTER = {
    "textual_alignment": True,
    "frame_consistency": True,
    "consecutive_consistency": True,
    "frame_accuracy": True,
    "pick_score": True,
    "attributes_edited": True,
    "attributes_kept": True,
    "consistency_to_truth": True,
    "psnr_to_truth": True,
    "track_error": False,
    "warping_error": False,
    "flicker": False,
    "excess_flicker": False,
}
# Where two runs are as good as each other; the newer one comes first where these agree too.
TIE_BREAK = ("textual_alignment", "frame_consistency")
NO_SCORES = ("source.", "seconds.", "system/")  # what a parent run has beside its mean scores
PAGE = 1000


@dataclass(frozen=True)
class PipelineRun:
    """A parent run: one clip under one set of parameters.

    Attributes:
        started: when it was first begun, in local time.
        status: MLflow's, in small letters: running, finished, failed, killed.
        parameters: all that decides its results, by dotted key.
        scores: means over its edits; empty where it has not come as far.
    """

    run_id: str
    name: str
    clip: str
    started: datetime
    status: str
    parameters: dict[str, str]
    scores: dict[str, float]

    @property
    def is_finished(self) -> bool:
        return bool(self.scores)


@dataclass(frozen=True)
class Comparison:
    """The runs of one clip, best first.

    Attributes:
        by: the metric that the order follows; None where no run has a score.
        metrics: every metric that one of the runs has, those of unknown direction last.
        differing: the parameters that are not the same in all of the runs.
        left_out: how many runs without scores are not among them.
    """

    clip: str
    by: str | None
    metrics: list[str]
    differing: list[str]
    runs: list[PipelineRun]
    left_out: int

    def best(self, metric: str) -> float | None:
        """The best value, where the direction is known and two runs at least have one."""
        values = [run.scores[metric] for run in self.runs if metric in run.scores]
        if metric not in HIGHER_IS_BETTER or len(values) < 2:
            return None
        return max(values) if HIGHER_IS_BETTER[metric] else min(values)


def compare(root: Path, clips: Sequence[str] = (), by: str | None = None, everything: bool = False) -> list[Comparison]:
    """One comparison for each clip, in the order of their names.

    Args:
        root: the project's folder; its params.yaml says where the store is.
        clips: which clips; none: all that have runs.
        by: the metric to order by. None: textual_alignment, or the first in `HIGHER_IS_BETTER` that there is. Ties go to
            the better textual_alignment, then frame_consistency, then to the newer run; a run without the metric is last.
        everything: runs without scores too.

    Raises:
        TavError: no store, no runs to show, a clip without runs, or a metric that no run has.
    """
    runs = read_runs(root)
    known = sorted({run.clip for run in runs})
    for clip in clips:
        if clip not in known:
            raise TavError(f"--clip: no runs of {clip!r}; there are runs of: {', '.join(known)}")
    chosen = [run for run in runs if not clips or run.clip in clips]
    shown = [run for run in chosen if everything or run.is_finished]
    if not shown:
        raise TavError(f"none of the {len(chosen)} runs has scores yet; --all shows them")
    there = {metric for run in shown for metric in run.scores}
    if by is not None and not (by in there and by in HIGHER_IS_BETTER):
        allowed = [metric for metric in HIGHER_IS_BETTER if metric in there]
        raise TavError(f"--by: no metric {by!r} to order by; allowed: {', '.join(allowed) or 'none, without scores'}")
    return [
        _compare_clip(
            clip,
            [run for run in shown if run.clip == clip],
            by,
            left_out=sum(run.clip == clip and run not in shown for run in chosen),
        )
        for clip in sorted({run.clip for run in shown})
    ]


def _compare_clip(clip: str, runs: list[PipelineRun], by: str | None, left_out: int) -> Comparison:
    there = {metric for run in runs for metric in run.scores}
    metrics = [metric for metric in HIGHER_IS_BETTER if metric in there]
    order_by = by or (metrics[0] if metrics else None)
    keys = dict.fromkeys(key for run in runs for key in run.parameters)
    return Comparison(
        clip=clip,
        by=order_by,
        metrics=metrics + sorted(there - set(metrics)),
        differing=[key for key in keys if len({run.parameters.get(key) for run in runs}) > 1],
        runs=sorted(runs, key=lambda run: _order(run, order_by)),
        left_out=left_out,
    )


def _order(run: PipelineRun, by: str | None) -> tuple[Any, ...]:
    """What sorts the best run first."""

    def badness(metric: str | None) -> float:
        if metric is None or metric not in run.scores:
            return float("inf")
        return -run.scores[metric] if HIGHER_IS_BETTER[metric] else run.scores[metric]

    return (*(badness(metric) for metric in (by, *TIE_BREAK)), -run.started.timestamp(), run.run_id)


def as_rows(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """The comparisons as plain values for JSON, one a run: those of the tables, and all parameters."""
    return [
        {
            "clip": comparison.clip,
            "rank": rank,
            "by": comparison.by,
            "run": run.name,
            "run_id": run.run_id,
            "started": run.started.isoformat(timespec="seconds"),
            "status": run.status,
            "finished": run.is_finished,
            "differing": {key: run.parameters.get(key) for key in comparison.differing},
            "parameters": run.parameters,
            "scores": run.scores,
        }
        for comparison in comparisons
        for rank, run in enumerate(comparison.runs, 1)
    ]


# The store


def read_runs(root: Path) -> list[PipelineRun]:
    """All parent runs of the experiment that params.yaml names, deleted ones left out.

    Raises:
        TavError: nothing is tracked; no store, experiment or run yet; or a store that cannot be read.
    """
    tracking = load_params(root / "params.yaml").tracking
    if tracking.uri is None:
        raise TavError("params.yaml: tracking.uri is null, so no run was logged; give a store, as sqlite:///mlflow.db")
    uri = resolve_uri(tracking.uri, project_root(root))
    nothing = TavError(f"no runs yet in {redact(uri)}, experiment {tracking.experiment!r}; `dvc repro` makes some")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with contextlib.ExitStack() as stack:
        try:
            client = stack.enter_context(_opened(uri))
            runs = None if client is None else _search(client, tracking.experiment)
        except Exception as error:  # Of MLflow, SQLAlchemy, a database's driver or the network.
            raise TavError(f"{redact(uri)}: the runs cannot be read ({_reason(error)})") from error
    if not runs:
        raise nothing
    return [_pipeline_run(run) for run in runs]


@contextlib.contextmanager
def _opened(uri: str) -> Iterator[MlflowClient | None]:
    """A client of the store, or None where there is no store yet."""
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///").partition("?")[0])
        if not path.is_file():
            yield None
            return
        with tempfile.TemporaryDirectory(prefix="tav-") as folder:
            copy = Path(folder) / "mlflow.db"
            _copy_database(path, copy)
            yield _client(f"sqlite:///{copy}")
        return
    if not uri.startswith("http"):
        import sqlalchemy

        # MLflow would fill an empty database with its tables.
        if not sqlalchemy.inspect(sqlalchemy.create_engine(uri)).has_table("experiments"):
            yield None
            return
    yield _client(uri)


def _copy_database(path: Path, copy: Path) -> None:
    """By SQLite itself, which sees a whole state of a file that another process writes."""
    source = f"file:{quote(str(path))}?mode=ro"
    with (
        contextlib.closing(sqlite3.connect(source, uri=True)) as original,
        contextlib.closing(sqlite3.connect(copy)) as new,
    ):
        original.backup(new)


def _client(uri: str) -> MlflowClient:
    import logging

    import mlflow.store.db.utils
    from mlflow import MlflowClient

    # What MLflow and Alembic say while they open a file is no answer to what was asked.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Its own 10 attempts to open a database take 100 s.
    mlflow.store.db.utils.MAX_RETRY_COUNT = 2
    return MlflowClient(tracking_uri=uri)


def _search(client: MlflowClient, experiment: str) -> list[Run]:
    found = client.get_experiment_by_name(experiment)
    runs: list[Run] = []
    token = None
    while found is not None:
        page = client.search_runs(
            [found.experiment_id], "tags.`tav.kind` = 'pipeline'", max_results=PAGE, page_token=token
        )
        runs += page
        token = page.token
        if not token:
            break
    return runs


def _pipeline_run(run: Run) -> PipelineRun:
    return PipelineRun(
        run_id=run.info.run_id,
        name=run.info.run_name,
        clip=run.data.tags.get("tav.clip", ""),
        started=datetime.fromtimestamp(run.info.start_time / 1000).astimezone(),
        status=run.info.status.lower(),
        parameters=dict(run.data.params),
        scores={name: value for name, value in run.data.metrics.items() if not name.startswith(NO_SCORES)},
    )


def _reason(error: BaseException) -> str:
    """One line, without secrets, of the error under the others."""
    while (inner := error.__cause__ or error.__context__) is not None and str(inner):
        error = inner
    return redact(str(error).strip().partition("\n")[0] or type(error).__name__)
