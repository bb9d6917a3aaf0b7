"""Read the pipeline's runs back from MLflow's store, without changing the store.

A SQLite file is copied and the copy is read. So no file is created beside the original, and when MLflow upgrades an
older database as it opens it, only the copy is upgraded.
"""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from tav.config import load_params
from tav.runtime.redaction import redact
from tav.tracking.store import open_client, project_root, resolve_uri, root_cause
from tav_model.errors import TavError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

# Prefixes of a parent run's metrics that are not mean scores; earlier versions logged system metrics there.
OTHER_METRICS = ("source.", "seconds.", "system/")
PAGE_SIZE = 1000
# Tags of a parent run: how many edits its means are over, and a digest of their names and prompts.
EDITS, EDITS_DIGEST = "tav.edits", "tav.edits.digest"


@dataclass(frozen=True)
class PipelineRun:
    """A parent run: one clip with one set of parameters.

    Attributes:
        started: when it was first opened, in local time.
        status: MLflow's status in lower case: running, finished, failed or killed.
        parameters: all that determine its results, by dotted key.
        scores: means over its edits; empty before the score stage.
        edits: how many edits the means are over; None where the run does not say so, as those of earlier versions.
        edits_digest: the same for equal names and prompts of these edits.
    """

    run_id: str
    name: str
    clip: str
    started: datetime
    status: str
    parameters: dict[str, str]
    scores: dict[str, float]
    edits: int | None = None
    edits_digest: str | None = None

    @property
    def has_scores(self) -> bool:
        """Whether the score stage has run."""
        return bool(self.scores)


def read_runs(root: Path) -> list[PipelineRun]:
    """Return all parent runs of the experiment that params.yaml names, except deleted ones.

    Raises:
        TavError: Tracking is off; there is no store, experiment or run yet; or the store cannot be read.
    """
    tracking = load_params(root / "params.yaml").tracking
    if tracking.uri is None:
        raise TavError("params.yaml: tracking.uri is null, so no run was logged; set a store, e.g. sqlite:///mlflow.db")
    uri = resolve_uri(tracking.uri, project_root(root))
    try:
        with _opened(uri) as client:
            runs = [] if client is None else _search(client, tracking.experiment)
    except Exception as error:  # from MLflow, SQLAlchemy, a database driver or the network
        raise TavError(f"{redact(uri)}: the runs cannot be read ({root_cause(error, uri)})") from error
    if not runs:
        raise TavError(
            f"no runs yet in {redact(uri)}, experiment {tracking.experiment!r}; `tav run` logs what it computes"
        )
    return [_pipeline_run(run) for run in runs]


@contextlib.contextmanager
def _opened(uri: str) -> Iterator[MlflowClient | None]:
    """Yield a client of the store, or None if the store does not exist yet."""
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///").partition("?")[0])
        if not path.is_file():
            yield None
            return
        with tempfile.TemporaryDirectory(prefix="tav-") as folder:
            copy = Path(folder) / "mlflow.db"
            _copy_database(path, copy)
            yield open_client(f"sqlite:///{copy}")
        return
    if not uri.startswith("http"):
        import sqlalchemy

        # MLflow would create its tables in an empty database.
        if not sqlalchemy.inspect(sqlalchemy.create_engine(uri)).has_table("experiments"):
            yield None
            return
    yield open_client(uri)


def _copy_database(path: Path, copy: Path) -> None:
    """Copy with SQLite's backup, which sees a consistent state even while another process writes."""
    source = f"file:{quote(str(path))}?mode=ro"
    with (
        contextlib.closing(sqlite3.connect(source, uri=True)) as original,
        contextlib.closing(sqlite3.connect(copy)) as new,
    ):
        original.backup(new)


def _search(client: MlflowClient, experiment_name: str) -> list[Run]:
    experiment = client.get_experiment_by_name(experiment_name)
    if experiment is None:
        return []
    runs: list[Run] = []
    token = None
    while True:
        page = client.search_runs(
            [experiment.experiment_id], "tags.`tav.kind` = 'pipeline'", max_results=PAGE_SIZE, page_token=token
        )
        runs += page
        token = page.token
        if not token:
            return runs


def _pipeline_run(run: Run) -> PipelineRun:
    return PipelineRun(
        run_id=run.info.run_id,
        name=run.info.run_name,
        clip=run.data.tags.get("tav.clip", ""),
        started=datetime.fromtimestamp(run.info.start_time / 1000).astimezone(),
        status=run.info.status.lower(),
        parameters=dict(run.data.params),
        scores={name: value for name, value in run.data.metrics.items() if not name.startswith(OTHER_METRICS)},
        edits=int(run.data.tags[EDITS]) if EDITS in run.data.tags else None,
        edits_digest=run.data.tags.get(EDITS_DIGEST),
    )
