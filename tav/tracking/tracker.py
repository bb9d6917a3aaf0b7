"""MLflow runs of a clip's pipeline: one parent run for each clip and configuration, with child runs.

The processes that run the stages find each other's runs by a digest in the tag `tav.key`. What is logged becomes a series
of entries (`tav.tracking.entries`), which are delivered to the store or wait in the outbox. Tracking never stops the work.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tav.runtime.redaction import redact
from tav.tracking.delivery import Delivery
from tav.tracking.entries import Dataset, EndStatus, MetricPoint, Model, RunIdentity, milliseconds
from tav.tracking.outbox import Outbox
from tav.tracking.provenance import environment_tags
from tav.tracking.run_names import pipeline_name, with_settings
from tav.tracking.store import Store, project_root, resolve_uri
from tav_model.digests import digest

FLUSH_SECONDS = 2.0
MAX_VALUE_LENGTH = 6000  # characters, MLflow's limit for a parameter


class Tracker:
    """Finds or creates the runs of one MLflow experiment. Nothing is imported or contacted before the first run.

    ``with Tracker("sqlite:///mlflow.db", "tav", root) as tracker: run = tracker.pipeline("ball", params)``

    Several threads may use it. Leaving the `with` block sends what the runs still hold.

    Args:
        uri: a database or a server; a relative SQLite path counts from the project's root. None: nothing is tracked.
        experiment: the MLflow experiment's name.
        root: the project's root. A DVC experiment's temporary copy logs to the real project's store.
        tags: further tags for every run, such as a Prefect flow run's id.

    Raises:
        TavError: `uri` names neither a database nor a server. A store that does not answer is not an error.
    """

    def __init__(self, uri: str | None, experiment: str, root: Path, tags: Mapping[str, str] | None = None) -> None:
        self._root, self._more_tags = root, tags or {}
        self._opened: list[Run] = []
        self.delivery: Delivery | None = None
        if uri is not None:
            home = project_root(root)
            self.delivery = Delivery(Store(resolve_uri(uri, home), experiment, home), Outbox(home))

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for run in list(self._opened):
            run.flush()

    def pipeline(self, clip: str, params: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> Run:
        """Open the parent run of a clip and a configuration.

        The same clip and parameters lead to the same run in every process. It is named like
        `ball · first,former · 300 steps`, followed by a few of `changes`: `… · edit.guidance_scale 5.0`. Where another
        run of the clip has this name, it is followed by settings that differ from that run's.

        Args:
            clip: the clip's name.
            params: flat, by dotted key: all that determine a result, and no others.
            changes: the parameters to mention in the name.
        """
        texts = _texts(params)
        identity = _pipeline_identity(clip, texts)
        identity["name"] = with_settings(identity["name"], _texts(changes or {}))
        return self.open(identity, texts)

    def find(self, clip: str, params: Mapping[str, Any]) -> tuple[str, str] | None:
        """Return the ids of the experiment and of that run, without changing it; None if it or the store is not there."""
        if self.delivery is None:
            return None
        return self.delivery.find(_pipeline_identity(clip, _texts(params))["key"])

    def open(self, identity: RunIdentity, params: dict[str, str]) -> Run:
        """Open the run with this identity, which is created if it does not exist."""
        run = Run(self, identity)
        self._opened.append(run)
        if self.delivery is not None:
            tags = _texts({**environment_tags(self._root), **self._more_tags})
            self.delivery.send(identity, {"tags": tags, "params": params, "status": "RUNNING"})
        return run


class Run:
    """An MLflow run. Metrics are held for about 2 s and sent together; `flush` and `finish` send what is held."""

    def __init__(self, tracker: Tracker, identity: RunIdentity) -> None:
        self.identity = identity
        self._tracker, self._delivery = tracker, tracker.delivery
        self._metrics: list[MetricPoint] = []
        self._flushed = time.monotonic()
        self._mutex = threading.RLock()
        self.has_metrics = False  # whether this process has logged any

    def child(self, kind: str, key: str, name: str) -> Run:
        """Open the run of a part of this one, such as the tuning or an edit.

        Args:
            kind: the kind of part, the tag `tav.kind`.
            key: identifies the part among those of its kind.
            name: the name of the run if it has to be created.
        """
        identity: RunIdentity = {
            "key": digest(self.identity["key"], kind, key),
            "kind": kind,
            "clip": self.identity["clip"],
            "name": name,
            "parent": self.identity,
        }
        return self._tracker.open(identity, {})

    @property
    def tracked(self) -> bool:
        """Whether anything is logged at all."""
        return self._delivery is not None

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log flat parameters. One that has another value already keeps it; the new value becomes a tag."""
        if self._delivery is not None:
            self._delivery.send(self.identity, {"params": _texts(params)})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags, which replace earlier values."""
        if self._delivery is not None:
            self._delivery.send(self.identity, {"tags": _texts(tags)})

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log the values of one step. A step that the store has already, from before an interruption, is left unchanged.

        Without `step`, they are results: a changed value replaces the earlier one.
        """
        now = milliseconds()
        with self._mutex:
            self.has_metrics = True
            self._metrics += [(name, float(value), step, now) for name, value in metrics.items()]
            if time.monotonic() - self._flushed >= FLUSH_SECONDS:
                self.flush()

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Copy a file or a folder into the run's artifacts, below `folder`; it replaces one with the same name."""
        if self._delivery is not None:
            self._delivery.send(self.identity, {"artifact": (str(path.absolute()), folder)})

    def log_dataset(self, dataset: Dataset) -> None:
        """Log the data that the run works on; once, however often it is called."""
        if self._delivery is not None:
            self._delivery.send(self.identity, {"dataset": dataset})

    def log_model(self, folder: Path, identity: str, params: Mapping[str, Any]) -> None:
        """Log a model that this run has made.

        Args:
            folder: the model as `mlflow.pyfunc.save_model` writes it; it is copied.
            identity: a digest of what the model is made from, by which other runs find it.
            params: parameters to show beside the model.
        """
        if self._delivery is not None:
            model: Model = {"identity": identity, "params": _texts(params), "path": str(folder.absolute())}
            self._delivery.send(self.identity, {"model": model})

    def link_model(self, identity: str) -> bool:
        """Link the model with this identity, if the store has it, and return whether it has."""
        if self._delivery is None or not self._delivery.has_model(identity):
            return False
        self._delivery.send(self.identity, {"model": {"identity": identity, "params": {}, "path": None}})
        return True

    def flush(self) -> None:
        """Send the metrics that are held."""
        with self._mutex:
            if self._metrics and self._delivery is not None:
                self._delivery.send(self.identity, {"metrics": self._metrics})
            self._metrics = []
            self._flushed = time.monotonic()

    def finish(self, status: EndStatus = "FINISHED") -> None:
        """Send what is held and end the run. A process that opens the run later sets it to running again."""
        self.flush()
        if self._delivery is not None:
            self._delivery.send(self.identity, {"status": status})


def _pipeline_identity(clip: str, params: Mapping[str, str]) -> RunIdentity:
    """Return the parent run's identity, named by what every name shows."""
    return {
        # Not the canonical JSON of other identities: runs in existing stores are found by this one.
        "key": digest("pipeline", clip, json.dumps(params, sort_keys=True)),
        "kind": "pipeline",
        "clip": clip,
        "name": pipeline_name(clip, params),
        "parent": None,
    }


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Return parameters or tags as they may be stored: without secrets, and not too long."""
    return {name: redact(str(value))[:MAX_VALUE_LENGTH] for name, value in values.items()}
