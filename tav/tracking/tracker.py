"""MLflow runs of a clip's pipeline: one parent run for a clip and a configuration, with child runs.

The processes that run the stages find each other's runs by a digest in the tag `tav.key`. What is logged is a series of
entries, and an entry can be sent twice without harm; so what does not reach the store is kept in
`.tav/tracking-missed.jsonl`, and sent by whoever reaches it next. Tracking never stops the work.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from tav.runtime.redaction import redact
from tav.tracking.provenance import environment_tags
from tav.tracking.store import ENVIRONMENT, project_root, resolve_uri
from tav_model.digests import digest
from tav_model.files import write_text

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 2.0
RETRY_SECONDS = 60.0
REPLAY_FAILURES = 3
# What MLflow takes in one call (1000 of everything together), and of one text.
PARAMS, TAGS, METRICS = 100, 100, 800
LENGTH = 6000
# So that its page opens with runs and their curves, and not with what language models want.
EXPERIMENT = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.note.content": "A run for each clip and configuration; below it, the tuning and each edit.",
}
# Of a run's name: what it always says, and how much of what else is other than usual.
NAMED = ("attention.spatial", "attention.temporal", "tune.steps")
MOST_PARTS, LONGEST_PART = 3, 30


class _Rejected(Exception):
    """The store was reached and will never take this entry."""


@dataclass
class _Stored:
    """A run in the store, and what of it is there already."""

    run_id: str
    tags: dict[str, str]
    params: dict[str, str]
    values: dict[str, float]
    """The latest value of each metric."""
    steps: dict[str, set[int]] = field(default_factory=dict)


class Tracker:
    """Finds or makes the runs of one MLflow experiment. Nothing is imported or reached before the first run.

    ``with Tracker("sqlite:///mlflow.db", "tav", root) as tracker: run = tracker.pipeline("ball", params)``

    Several threads may use it. Leaving the `with` block sends what the runs still hold.

    Args:
        uri: a database or a server; a relative SQLite path counts from the project's root. None: nothing is tracked.
        experiment: the MLflow experiment's name.
        root: the project's root. A DVC experiment's temporary copy logs to the real project's store.
        tags: further tags for every run, such as a Prefect flow run's id.

    Raises:
        TavError: `uri` is neither a database nor a server. A store that does not answer is no error.
    """

    def __init__(self, uri: str | None, experiment: str, root: Path, tags: Mapping[str, str] | None = None) -> None:
        self.experiment = experiment
        self._root = project_root(root)
        self._uri = None if uri is None else resolve_uri(uri, self._root)
        self._tags = {} if uri is None else _texts({**environment_tags(root), **(tags or {})})
        self._label = f"{redact(self._uri or '')} {experiment}"
        self._missed = self._root / ".tav" / "tracking-missed.jsonl"
        self._client: MlflowClient | None = None
        self._experiment_id = ""
        self._stored: dict[str, _Stored] = {}
        self._opened: list[Run] = []
        self._away_until = 0.0
        self._mutex = threading.RLock()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for run in self._opened:
            run.flush()

    def pipeline(self, clip: str, params: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> Run:
        """The parent run of `clip` under `params` (flat, dotted keys; all that decides a result, and nothing else).

        The same clip and parameters give the same run in every process, named like `ball · first,former · 300 steps`,
        and by the first few of `changes`: `ball · first,former · 300 steps · guidance_scale 5.0`.
        """
        identity, shown = self._pipeline(clip, params)
        others = [
            f"{name.rpartition('.')[2]} {value}" for name, value in _texts(changes or {}).items() if name not in NAMED
        ]
        parts = [identity["name"], *(part[:LONGEST_PART] for part in others[:MOST_PARTS]), "…"]
        identity["name"] = " · ".join(parts if len(others) > MOST_PARTS else parts[:-1])
        return self._open(identity, shown)

    def find(self, clip: str, params: Mapping[str, Any]) -> tuple[str, str] | None:
        """The ids of the experiment and of that run, without touching it; None if it or the store is not there."""
        if self._uri is None:
            return None
        identity, _ = self._pipeline(clip, params)
        with self._mutex, contextlib.suppress(Exception):
            for run in self._connect().search_runs(
                [self._experiment_id], f"tags.`tav.key` = '{identity['key']}'", max_results=1
            ):
                return self._experiment_id, run.info.run_id
        return None

    @staticmethod
    def _pipeline(clip: str, params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """The parent run's identity, and its parameters as texts."""
        shown = _texts(params)
        parts = [clip, shown.get("attention.spatial"), shown.get("tune.steps") and f"{shown['tune.steps']} steps"]
        if shown.get("attention.temporal") == "False":
            parts.insert(2, "no temporal")
        key = digest("pipeline", clip, json.dumps(shown, sort_keys=True))
        name = " · ".join(part for part in parts if part)
        return {"key": key, "kind": "pipeline", "clip": clip, "name": name, "parent": None}, shown

    def _open(self, identity: dict[str, Any], params: dict[str, str]) -> Run:
        run = Run(self, identity)
        with self._mutex:
            self._opened.append(run)
        self._send(run, tags=self._tags, params=params, status="RUNNING")
        return run

    # Sending

    def _send(self, run: Run, **content: Any) -> None:
        """Bring one entry to the store, or keep it for later."""
        if self._uri is None:
            return
        entry = {"store": self._label, "run": run.identity, "time": _milliseconds(), **content}
        with self._mutex:
            if time.monotonic() < self._away_until:
                if not self._keep(entry):
                    logger.warning("tracking: %s of %r lost", _kinds(entry), run.identity["name"])
                return
            started = time.monotonic()
            try:
                self._deliver(self._connect(), entry)
            except _Rejected as error:
                logger.warning("tracking: %s of %r not logged: %s", _kinds(entry), run.identity["name"], error)
            except Exception as error:
                self._client = None
                self._stored.clear()
                now = time.monotonic()
                # However long the store keeps us waiting, it costs the work 5 % at most.
                self._away_until = now + max(RETRY_SECONDS, 20 * (now - started))
                kept = self._keep(entry)
                logger.warning(
                    "tracking: %s: %s; %s of %r and what follows: %s",
                    redact(self._uri),
                    self._reason(error),
                    _kinds(entry),
                    run.identity["name"],
                    f"kept in {self._missed.relative_to(self._root)}, and sent when it answers" if kept else "lost",
                )

    def _connect(self) -> MlflowClient:
        if self._client is not None:
            return self._client
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import mlflow.store.db.utils
        from mlflow import MlflowClient

        if "MLFLOW_LOGGING_LEVEL" not in os.environ:
            # What MLflow logs before it raises is said here, in one line.
            logging.getLogger("mlflow").setLevel(logging.CRITICAL)
        # Its own 10 attempts to open a database take 100 s.
        mlflow.store.db.utils.MAX_RETRY_COUNT = 2
        with self._lock("tracking"):
            client = MlflowClient(tracking_uri=self._uri)
            experiment = client.get_experiment_by_name(self.experiment)
            if experiment is None:
                self._experiment_id = client.create_experiment(self.experiment, self._artifact_location())
                for name, text in EXPERIMENT.items():
                    client.set_experiment_tag(self._experiment_id, name, text)
            else:
                self._experiment_id = experiment.experiment_id
        self._client = client
        self._replay(client)
        return client

    def _artifact_location(self) -> str | None:
        """Beside the database; a server knows its own place."""
        uri = self._uri or ""
        if uri.startswith("http"):
            return None
        if uri.startswith("sqlite:///"):
            return (Path(uri.removeprefix("sqlite:///").partition("?")[0]).parent / "mlartifacts").as_uri()
        return (self._root / "mlartifacts").as_uri()

    def _deliver(self, client: MlflowClient, entry: dict[str, Any]) -> None:
        """Write an entry into the store, less what is there already.

        Raises:
            _Rejected: it can never be written.
        """
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.exceptions import MlflowException

        stored = self._find(client, entry["run"], entry["time"])
        params = {name: value for name, value in entry.get("params", {}).items() if stored.params.get(name) != value}
        # MLflow's parameters are written once; a later value, of a setting that decides no result, becomes a tag.
        tags = entry.get("tags", {}) | {name: params.pop(name) for name in params.keys() & stored.params.keys()}
        try:
            metrics = [Metric(*metric) for metric in self._new_metrics(client, stored, entry.get("metrics", []))]
            rows, labels = [Param(*pair) for pair in params.items()], [RunTag(*pair) for pair in tags.items()]
            while metrics or rows or labels:
                client.log_batch(stored.run_id, metrics[:METRICS], rows[:PARAMS], labels[:TAGS], synchronous=True)
                metrics, rows, labels = metrics[METRICS:], rows[PARAMS:], labels[TAGS:]
        except BaseException as error:
            # What the run holds is not certain now; it may even have been deleted.
            self._stored.pop(entry["run"]["key"], None)
            if isinstance(error, MlflowException) and error.error_code == "INVALID_PARAMETER_VALUE":
                raise _Rejected(self._reason(error)) from None
            raise
        stored.params |= params
        stored.tags |= tags
        if "artifact" in entry:
            path, folder = entry["artifact"]
            try:
                client.log_artifact(stored.run_id, str(self._root / path), folder)
            except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
                # The file is gone, or the store's own folder is: no later try would help.
                raise _Rejected(f"{error.filename}: {error.strerror}") from None
        if entry.get("status") == "RUNNING":
            client.update_run(stored.run_id, status="RUNNING")
        elif "status" in entry:
            client.set_terminated(stored.run_id, entry["status"], entry["time"])

    def _find(self, client: MlflowClient, identity: dict[str, Any], created: int) -> _Stored:
        """The run with this key, made if there is none."""
        key, parent = identity["key"], identity["parent"]
        if key in self._stored:
            return self._stored[key]
        tags = {"tav.key": key, "tav.kind": identity["kind"], "tav.clip": identity["clip"]}
        if parent is not None:
            tags["mlflow.parentRunId"] = self._find(client, parent, created).run_id
        with self._lock("tracking"):
            found = client.search_runs([self._experiment_id], f"tags.`tav.key` = '{key}'", max_results=1)
            run = found[0] if found else None
            if run is None:
                run = client.create_run(self._experiment_id, created, tags, identity["name"])
        self._stored[key] = _Stored(run.info.run_id, dict(run.data.tags), dict(run.data.params), dict(run.data.metrics))
        return self._stored[key]

    def _new_metrics(
        self, client: MlflowClient, stored: _Stored, metrics: list[list[Any]]
    ) -> Iterator[tuple[str, float, int, int]]:
        """Those not in the store: a step is logged once, and a value without a step again when it has changed."""
        for name, value, step, milliseconds in metrics:
            if step is None:
                if stored.values.get(name) == value:
                    continue
            else:
                if name not in stored.steps:
                    known = client.get_metric_history(stored.run_id, name) if name in stored.values else []
                    stored.steps[name] = {metric.step for metric in known}
                if step in stored.steps[name]:
                    continue
                stored.steps[name].add(step)
            stored.values[name] = value
            yield name, value, milliseconds, step or 0

    # What was missed

    def _keep(self, entry: dict[str, Any]) -> bool:
        """Append the entry to what is sent later, with a copy of its artifact, which may be gone by then."""
        try:
            if "artifact" in entry:
                path, folder = entry["artifact"]
                copy = self._missed.with_suffix("") / uuid.uuid4().hex / Path(path).name
                copy.parent.mkdir(parents=True)
                (shutil.copytree if Path(path).is_dir() else shutil.copyfile)(path, copy)
                entry = entry | {"artifact": [copy.relative_to(self._root).as_posix(), folder]}
            with self._lock("tracking-missed"), self._missed.open("a", encoding="utf-8") as file:
                # Should a killed process have left half a line, this one still stands alone.
                file.write(f"\n{json.dumps(entry)}\n")
        except OSError:
            return False
        return True

    def _replay(self, client: MlflowClient) -> None:
        """Send what this store has missed; what fails stays."""
        with self._lock("tracking-missed"):
            if not self._missed.exists():
                return
            lines = self._missed.read_text(encoding="utf-8", errors="replace").splitlines()
            kept, sent, failures = [], 0, 0
            for line in filter(None, lines):
                try:
                    entry = json.loads(line)
                    store = entry["store"]
                except (ValueError, TypeError, KeyError):
                    logger.warning("tracking: %s: dropped a line that is not whole", self._missed.name)
                    continue
                if store != self._label or failures >= REPLAY_FAILURES:
                    kept.append(line)
                    continue
                try:
                    self._deliver(client, entry)
                    sent += 1
                except _Rejected as error:
                    logger.warning("tracking: %s of %r dropped: %s", _kinds(entry), entry["run"]["name"], error)
                except Exception as error:
                    logger.warning("tracking: %s of %r: %s", _kinds(entry), entry["run"]["name"], self._reason(error))
                    kept.append(line)
                    failures += 1
                    continue
                if "artifact" in entry:
                    copy = self._root / entry["artifact"][0]
                    if copy.parent.parent == self._missed.with_suffix(""):
                        shutil.rmtree(copy.parent, ignore_errors=True)
            if kept:
                write_text(self._missed, "\n".join(kept) + "\n")
            else:
                self._missed.unlink(missing_ok=True)
            logger.info("tracking: sent %d entries kept from before, %d wait", sent, len(kept))

    # Small things

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """One process at a time; the lock goes with the process."""
        path = self._root / ".tav" / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _reason(self, error: BaseException) -> str:
        """One line, without secrets, of the error under the others: the refused connection rather than the request."""
        while (inner := error.__cause__ or error.__context__) is not None and str(inner):
            error = inner
        text = redact(str(error).strip().partition("\n")[0] or type(error).__name__)
        parts = urlsplit(self._uri or "")
        for secret in (parts.password, parts.query):
            if secret:
                text = text.replace(secret, "***")
        return text


class Run:
    """One MLflow run. Metrics are held for about 2 s and sent together; `flush` or `finish` sends the rest."""

    def __init__(self, tracker: Tracker, identity: dict[str, Any]) -> None:
        self.identity = identity
        self._tracker = tracker
        self._metrics: list[list[Any]] = []
        self._flushed = time.monotonic()

    def child(self, kind: str, key: str, name: str) -> Run:
        """The run of a part of this one (`tune`, `edit`): found by `kind` and `key`, else made and called `name`."""
        key = digest(self.identity["key"], kind, key)
        identity = {"key": key, "kind": kind, "clip": self.identity["clip"], "name": name, "parent": self.identity}
        return self._tracker._open(identity, {})

    @property
    def tracked(self) -> bool:
        """Whether anything is logged at all."""
        return self._tracker._uri is not None

    def tag(self, name: str) -> str | None:
        """A tag's value in the store; None where it has none, or does not answer now."""
        with self._tracker._mutex:
            stored = self._tracker._stored.get(self.identity["key"])
            return stored.tags.get(name) if stored else None

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log flat parameters. One that has another value already keeps it; the new value becomes a tag."""
        self._tracker._send(self, params=_texts(params))

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        self._tracker._send(self, tags=_texts(tags))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log the values of one step; a step that is in the store already, from before a resumption, is left as it is.

        Without `step` they are results: a changed value takes the place of the one before.
        """
        now = _milliseconds()
        with self._tracker._mutex:
            self._metrics += [[name, float(value), step, now] for name, value in metrics.items()]
            if time.monotonic() - self._flushed >= FLUSH_SECONDS:
                self.flush()

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Copy a file or a folder into the run's artifacts, below `folder`, in place of one with the same name."""
        self._tracker._send(self, artifact=[str(path.absolute()), folder])

    def flush(self) -> None:
        """Send the metrics that are held."""
        with self._tracker._mutex:
            if self._metrics:
                self._tracker._send(self, metrics=self._metrics)
                self._metrics = []
            self._flushed = time.monotonic()

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        """Send what is held and end the run. The next process that asks for the run opens it again."""
        self.flush()
        self._tracker._send(self, status=status)


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Parameters or tags as they may stand in a store."""
    return {name: redact(str(value))[:LENGTH] for name, value in values.items()}


def _milliseconds() -> int:
    return time.time_ns() // 1_000_000


def _kinds(entry: dict[str, Any]) -> str:
    """What an entry holds, for messages: `params, tags, status`."""
    return ", ".join(kind for kind in ("params", "tags", "metrics", "artifact", "status") if kind in entry)
