"""Read back what was logged to an MLflow store, and what waits in the outbox."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tav.tracking.store import resolve_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

URI = "sqlite:///mlflow.db"
PARAMS = {"attention.spatial": "first,former", "attention.temporal": True, "tune.steps": 300, "seed": 33}


def client(root: Path, uri: str = URI) -> MlflowClient:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=resolve_uri(uri, root))


def runs(root: Path, uri: str = URI) -> list[Run]:
    """Return all runs of the experiment `tav`, the oldest first."""
    store = client(root, uri)
    experiment = store.get_experiment_by_name("tav")
    return store.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"]) if experiment else []


def history(root: Path, name: str, uri: str = URI, run: int = -1) -> list[tuple[int, float]]:
    """Return the steps and values of a metric of one of `runs`."""
    store = client(root, uri)
    return [(point.step, point.value) for point in store.get_metric_history(runs(root, uri)[run].info.run_id, name)]


def missed(root: Path) -> list[dict[str, Any]]:
    """Return the entries in the outbox."""
    path = root / ".tav" / "tracking-missed.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []
