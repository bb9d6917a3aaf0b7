"""MLflow's store: its address, the connection to it, and the delivery of entries."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tav.runtime.locks import waiting_lock
from tav.runtime.redaction import redact
from tav.tracking.entries import Dataset, Entry, MetricPoint, Model, RunIdentity
from tav.tracking.pages import VIEW_TAG, experiment_tags
from tav.tracking.run_names import distinct_name
from tav_model.errors import TavError, first_line

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run

SERVERS = ("http", "https", "postgresql", "mysql", "mssql")
# Defaults for MLflow; the user's own settings take precedence. No telemetry, because the project is offline by default;
# no retries, because an unreachable server must cost one short wait and the entry is sent later.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
# MLflow's limits for one call (1000 items in total).
PARAMS_PER_CALL, TAGS_PER_CALL, METRICS_PER_CALL = 100, 100, 800
MODEL = "model"  # the name of every model: `runs:/RUN/model` loads that of the run which made it


def project_root(root: Path) -> Path:
    """Return `root`, or the project of which it is a DVC experiment's temporary copy (below `.dvc/tmp/exps`)."""
    parts = root.resolve().parts
    for i in range(len(parts) - 2):
        if parts[i : i + 3] == (".dvc", "tmp", "exps"):
            return Path(*parts[:i])
    return root.resolve()


def resolve_uri(uri: str, root: Path) -> str:
    """Return the tracking URI, with a relative SQLite path made absolute from `root`.

    Raises:
        TavError: The URI names neither a database nor a server.
    """
    scheme = uri.partition(":")[0].partition("+")[0]
    if scheme in SERVERS and "://" in uri:
        return uri
    name, question, query = uri.removeprefix("sqlite:///").partition("?")
    if uri.startswith("sqlite:///") and name not in ("", ":memory:"):
        return f"sqlite:///{os.path.normpath(root / name)}{question}{query}"
    raise TavError(
        f"params.yaml: tracking.uri: {redact(uri)!r} is not allowed; use a database file (sqlite:///mlflow.db), "
        f"a server (http://127.0.0.1:5000) or another database ({', '.join(SERVERS[2:])})"
    )


def open_client(uri: str) -> MlflowClient:
    """Return a client of the store that fails fast and logs nothing of its own, unless MLFLOW_LOGGING_LEVEL is set."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow.store.db.utils
    from mlflow import MlflowClient

    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        # What they log before an error is raised is reported here, in one line.
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    # MLflow's default of 10 attempts to open a database takes 100 s.
    mlflow.store.db.utils.MAX_RETRY_COUNT = 2
    return MlflowClient(tracking_uri=uri)


def root_cause(error: BaseException, uri: str) -> str:
    """Return the first line of the innermost error, without secrets: the refused connection rather than the request."""
    while (inner := error.__cause__ or error.__context__) is not None and str(inner):
        error = inner
    text = redact(first_line(error))
    parts = urlsplit(uri)
    for secret in (parts.password, parts.query):
        if secret:
            text = text.replace(secret, "***")
    return text


class RejectedError(Exception):
    """The store was reached and will never accept this entry."""


@dataclass
class _StoredRun:
    """A run in the store, and what is known to be there.

    Attributes:
        values: the latest value of each metric.
        steps: the steps that each metric has, read when first needed.
    """

    run_id: str
    tags: dict[str, str]
    params: dict[str, str]
    values: dict[str, float]
    steps: dict[str, set[int]] = field(default_factory=dict)


class Store:
    """One experiment of one store. Not thread-safe: `tav.tracking.tracker.Tracker` serialises the calls.

    Args:
        uri: as returned by `resolve_uri`.
        experiment: the MLflow experiment's name; it is created if it does not exist.
        root: the project's root, from which relative artifact paths count.

    Attributes:
        label: identifies the store in entries, without secrets.
    """

    def __init__(self, uri: str, experiment: str, root: Path) -> None:
        self.uri, self.experiment, self.root = uri, experiment, root
        self.label = f"{redact(uri)} {experiment}"
        self._lock_file = root / ".tav" / "tracking.lock"
        self._client: MlflowClient | None = None
        self._experiment_id = ""
        self._runs: dict[str, _StoredRun] = {}

    @property
    def is_connected(self) -> bool:
        """Whether the store has been reached and nothing has failed since."""
        return self._client is not None

    def connect(self) -> None:
        """Connect to the store, and create the experiment if it does not exist; an older one gets tags that it lacks."""
        if self._client is not None:
            return
        # Two processes may be the first to open a database.
        with waiting_lock(self._lock_file):
            client = open_client(self.uri)
            experiment = client.get_experiment_by_name(self.experiment)
            if experiment is None:
                self._experiment_id, known = client.create_experiment(self.experiment, self._artifact_location()), {}
            else:
                self._experiment_id, known = experiment.experiment_id, experiment.tags
            for name, text in experiment_tags().items():
                if name not in known or (name == VIEW_TAG and known[name] != text):
                    client.set_experiment_tag(self._experiment_id, name, text)
        self._client = client

    def disconnect(self) -> None:
        """Forget the connection and all that is known of the store's runs."""
        self._client = None
        self._runs.clear()

    @property
    def experiment_id(self) -> str:
        """The id of the experiment in the store, once connected."""
        return self._experiment_id

    def find(self, key: str) -> tuple[str, str] | None:
        """Return the ids of the experiment and of the run with this key, if the run exists."""
        self.connect()
        run = self._search(key)
        return (self._experiment_id, run.info.run_id) if run else None

    def deliver(self, entry: Entry) -> None:
        """Write an entry into the store, except for what is there already. The store must be connected.

        Raises:
            RejectedError: It can never be written.
        """
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.exceptions import MlflowException

        client = self._connected()
        stored = self._stored_run(entry["run"], entry["time"], entry.get("params", {}))
        params = {name: value for name, value in entry.get("params", {}).items() if stored.params.get(name) != value}
        # MLflow's parameters cannot be overwritten; a later value (of a setting that affects no result) becomes a tag.
        tags = entry.get("tags", {}) | {name: params.pop(name) for name in params.keys() & stored.params.keys()}
        try:
            metrics = [Metric(*metric) for metric in self._new_metrics(stored, entry.get("metrics", []))]
            rows, labels = [Param(*pair) for pair in params.items()], [RunTag(*pair) for pair in tags.items()]
            while metrics or rows or labels:
                client.log_batch(
                    stored.run_id,
                    metrics[:METRICS_PER_CALL],
                    rows[:PARAMS_PER_CALL],
                    labels[:TAGS_PER_CALL],
                    synchronous=True,
                )
                metrics, rows, labels = metrics[METRICS_PER_CALL:], rows[PARAMS_PER_CALL:], labels[TAGS_PER_CALL:]
        except BaseException as error:
            # It is uncertain now what the run holds; it may even have been deleted.
            self._runs.pop(entry["run"]["key"], None)
            if isinstance(error, MlflowException) and error.error_code == "INVALID_PARAMETER_VALUE":
                raise RejectedError(root_cause(error, self.uri)) from None
            raise
        stored.params |= params
        stored.tags |= tags
        if "dataset" in entry:
            self._log_dataset(stored, entry["dataset"])
        if "artifact" in entry:
            self._log_artifact(stored, *entry["artifact"])
        if "model" in entry:
            self._log_model(stored, entry["model"], entry["run"]["clip"])
        status = entry.get("status")
        if status == "RUNNING":
            client.update_run(stored.run_id, status="RUNNING")
        elif status is not None:
            client.set_terminated(stored.run_id, status, entry["time"])

    def _connected(self) -> MlflowClient:
        if self._client is None:
            raise RuntimeError("the store is not connected")
        return self._client

    def _artifact_location(self) -> str | None:
        """Return the folder beside the database; None for a server, which has its own."""
        if self.uri.startswith("http"):
            return None
        if self.uri.startswith("sqlite:///"):
            return (Path(self.uri.removeprefix("sqlite:///").partition("?")[0]).parent / "mlartifacts").as_uri()
        return (self.root / "mlartifacts").as_uri()

    def _log_artifact(self, stored: _StoredRun, path: str, folder: str | None) -> None:
        try:
            self._connected().log_artifact(stored.run_id, str(self.root / path), folder)
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            # The file is gone, or the store's own folder is: a later attempt would fail too.
            raise RejectedError(f"{error.filename}: {error.strerror}") from None

    def _log_dataset(self, stored: _StoredRun, dataset: Dataset) -> None:
        from mlflow.entities import Dataset as StoredDataset
        from mlflow.entities import DatasetInput, InputTag

        features = {"type": "tensor", "tensor-spec": {"dtype": dataset["dtype"], "shape": dataset["shape"]}}
        described = StoredDataset(
            name=dataset["name"],
            digest=dataset["digest"],
            source_type="local",
            source=json.dumps({"uri": dataset["source"]}),
            schema=json.dumps({"mlflow_tensorspec": {"features": features, "targets": None}}),
            profile=json.dumps(dataset["profile"]),
        )
        tags = [InputTag("mlflow.data.context", dataset["context"])]
        self._connected().log_inputs(stored.run_id, datasets=[DatasetInput(described, tags)])

    def find_model(self, identity: str) -> LoggedModel | None:
        """Return the complete model with this identity, if the experiment has it."""
        self.connect()
        found = self._connected().search_logged_models([self._experiment_id], f"tags.`tav.model` = '{identity}'")
        return next((model for model in found if model.status == "READY"), None)

    def _log_model(self, stored: _StoredRun, model: Model, clip: str) -> None:
        """Log a model as the run's output, unless the store has it; one that another run has made becomes an input."""
        from mlflow.entities import LoggedModelInput, LoggedModelOutput

        client, found = self._connected(), self.find_model(model["identity"])
        if found is None:
            if model["path"] is None:
                raise RejectedError("the model was deleted from the store")
            tags = {"tav.model": model["identity"], "tav.clip": clip}
            found = client.create_logged_model(self._experiment_id, MODEL, stored.run_id, tags, model["params"])
            client.log_model_artifacts(found.model_id, str(self.root / model["path"]))
            client.finalize_logged_model(found.model_id, "READY")
        run = client.get_run(stored.run_id)
        if found.source_run_id != stored.run_id:
            if not run.inputs or all(one.model_id != found.model_id for one in run.inputs.model_inputs):
                client.log_inputs(stored.run_id, models=[LoggedModelInput(found.model_id)])
        elif not run.outputs or all(one.model_id != found.model_id for one in run.outputs.model_outputs):
            client.log_outputs(stored.run_id, [LoggedModelOutput(found.model_id, step=0)])

    def _stored_run(self, identity: RunIdentity, created: int, params: Mapping[str, str]) -> _StoredRun:
        """Return the run with this identity, created if it does not exist; `params` tell it from others by name."""
        key, parent = identity["key"], identity["parent"]
        if key in self._runs:
            return self._runs[key]
        tags = {"tav.key": key, "tav.kind": identity["kind"], "tav.clip": identity["clip"]}
        if parent is not None:
            tags["mlflow.parentRunId"] = self._stored_run(parent, created, {}).run_id
        with waiting_lock(self._lock_file):
            run = self._search(key)
            if run is None:
                name = identity["name"] if parent is not None else self._distinct_name(identity, params)
                run = self._connected().create_run(self._experiment_id, created, tags, name)
        stored = _StoredRun(run.info.run_id, dict(run.data.tags), dict(run.data.params), dict(run.data.metrics))
        self._runs[key] = stored
        return stored

    def _distinct_name(self, identity: RunIdentity, params: Mapping[str, str]) -> str:
        """Return a name that no other run of the clip has."""
        ours = f"tags.`tav.kind` = '{identity['kind']}' and tags.`tav.clip` = '{identity['clip']}'"
        runs = self._connected().search_runs([self._experiment_id], ours, order_by=["attributes.start_time DESC"])
        return distinct_name(identity["name"], params, {run.info.run_name: run.data.params for run in runs})

    def _search(self, key: str) -> Run | None:
        found = self._connected().search_runs([self._experiment_id], f"tags.`tav.key` = '{key}'", max_results=1)
        return found[0] if found else None

    def _new_metrics(self, stored: _StoredRun, metrics: Sequence[MetricPoint]) -> Iterator[tuple[str, float, int, int]]:
        """Yield the metrics that the store lacks: a step is logged once, a result again when its value has changed."""
        for name, value, step, time in metrics:
            if step is None:
                if stored.values.get(name) == value:
                    continue
            else:
                if name not in stored.steps:
                    history = self._connected().get_metric_history(stored.run_id, name) if name in stored.values else []
                    stored.steps[name] = {metric.step for metric in history}
                if step in stored.steps[name]:
                    continue
                stored.steps[name].add(step)
            stored.values[name] = value
            yield name, value, time, step or 0
