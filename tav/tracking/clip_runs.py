"""What a clip's stages tell MLflow: one run for the pipeline, and child runs for the tuning and for each edit."""

from __future__ import annotations

import contextlib
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from tav.config import RESULT_SECTIONS, parse_params
from tav.config.dotted_keys import flatten
from tav.config.paths import Project
from tav.config.results import read_scores
from tav.config.stages import TRACKED_STAGES
from tav.runtime.events import Event, LoopProgressed, LoopResumed
from tav.tracking.system_metrics import system_metrics
from tav.tracking.tracker import Run, Tracker
from tav_model.errors import TavError
from tav_model.files import read_json, write_json

if TYPE_CHECKING:
    from tav.config import Params
    from tav.config.prompts import EditRow
    from tav_model.tuning import StepRecord


class SmoothedLoss:
    """The loss by range of timesteps, smoothed: one step's loss says more about its timestep than about the tuning."""

    RANGES = ((0, 250), (250, 500), (500, 750), (750, 1000))
    KEEP = 0.9

    def __init__(self) -> None:
        self._values: dict[str, float] = {}

    def update(self, loss: float, timestep: float) -> dict[str, float]:
        """The new value of the range that ``timestep`` lies in, by the metric's name."""
        low, high = next((r for r in self.RANGES if timestep < r[1]), self.RANGES[-1])
        name = f"loss.timesteps_{low}_to_{high}"
        self._values[name] = self.KEEP * self._values.get(name, loss) + (1 - self.KEEP) * loss
        return {name: self._values[name]}


class TuningCurve:
    """Log the steps of a tuning to its MLflow run; a subscriber of the stage's events.

    Steps of before an interruption are logged once more, since the interruption may have come before they all were;
    their speed is unknown.
    """

    def __init__(self, run: Run, clip: str) -> None:
        self._run, self._clip, self._smoothed, self._last = run, clip, SmoothedLoss(), time.monotonic()

    def __call__(self, event: Event) -> None:
        """Log what an event about this clip's tuning holds."""
        if event.clip != self._clip or event.stage != "tune":
            return
        if isinstance(event, LoopResumed):
            self._smoothed = SmoothedLoss()
            for record in event.records:
                self._log(record, {})
            self._last = event.time
        elif isinstance(event, LoopProgressed):
            self._log(event.record, {"steps_per_second": 1 / max(event.time - self._last, 1e-9)})
            self._last = event.time

    def _log(self, record: StepRecord, more: dict[str, float]) -> None:
        values = {"loss": record.loss, "learning_rate": record.learning_rate, "gradient_norm": record.gradient_norm}
        values |= self._smoothed.update(record.loss, record.timestep)
        self._run.log_metrics(values | more, step=record.step)


def peak_memory() -> float:
    """The most memory that this process has held so far, in GiB: the GPU's where it has used one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class ClipRuns:
    """The MLflow runs of one clip under the parameters of now. Nothing is imported before the first is asked for."""

    def __init__(self, root: Path, clip: str, params: Params, tags: Mapping[str, str] | None = None) -> None:
        self.root, self.clip, self.params = root, clip, params
        self.project = Project(root)
        self.tracker = Tracker(params.tracking.uri, params.tracking.experiment, root, tags)
        self._while_working = contextlib.ExitStack()
        self._watched = False

    @cached_property
    def pipeline(self) -> Run:
        """The parent run: every parameter, and later the mean scores and the contact sheet."""
        return self.tracker.pipeline(self.clip, self._settings(self.params), self._changes())

    def find(self) -> tuple[str, str] | None:
        """The ids of the experiment and of the parent run in the store, if both are there."""
        return self.tracker.find(self.clip, self._settings(self.params))

    def _settings(self, params: Params) -> dict[str, str | int | float]:
        """All that decides the results, flat."""
        sections = params.model_dump(mode="json")
        settings = {name: sections[name] for name in RESULT_SECTIONS}
        settings["decode"] = params.decode_for(self.clip).model_dump(mode="json")
        settings["caption"] = params.clip(self.clip).caption
        return flatten(settings)

    def _changes(self) -> dict[str, str | int | float]:
        """The settings that are not those of the last commit: what a sweep changes, and its runs are told apart by."""
        command = ["git", "show", "HEAD:./params.yaml"]
        try:
            text = subprocess.run(command, cwd=self.root, capture_output=True, timeout=10, check=True).stdout.decode()
            committed = self._settings(parse_params("params.yaml", text))
        except (OSError, subprocess.SubprocessError, UnicodeDecodeError, TavError):
            return {}  # No repository, or one with other parameters than this version knows.
        return {name: value for name, value in self._settings(self.params).items() if committed.get(name) != value}

    @contextlib.contextmanager
    def reporting(self, stage: str) -> Iterator[None]:
        """Note how long the stage takes and how it ends; short stages that have no run of their own wait for the score."""
        start = time.monotonic()
        try:
            with self.tracker, contextlib.ExitStack() as self._while_working:
                yield
        except BaseException as error:
            if "pipeline" in vars(self):  # A mistake found before there was anything to log needs no run.
                self.pipeline.finish(_ended(error))
            raise
        timings = self._timings() | {stage: round(time.monotonic() - start, 3)}
        write_json(self.project.timings(self.clip), timings)
        if stage in TRACKED_STAGES:
            if stage == "score":  # After the scores: MLflow's comparison shows first what was logged first.
                self.pipeline.log_metrics({f"seconds.{name}": seconds for name, seconds in timings.items()})
            self.pipeline.finish()

    @contextlib.contextmanager
    def tuning(self) -> Iterator[TuningCurve]:
        """The tuning's run, open while it lasts; yields a subscriber for its steps."""
        run = self.pipeline.child("tune", "tune", f"tune {self.clip}")
        run.log_params(flatten({"tune": self.params.tune.model_dump(mode="json")}))
        try:
            with system_metrics(run):
                yield TuningCurve(run, self.clip)
        except BaseException as error:
            run.finish(_ended(error))
            raise
        folder = self.project.tuned(self.clip)
        info = read_json(folder / "tuned.json")
        run.log_params({"tuned.parameters": info["parameters"]})
        run.log_metrics({"peak_memory_gib": peak_memory()})
        run.set_tags({"tav.tuned.sha256": info["sha256"], **self._dvc_hashes("decode", "encode")})
        for name in ("tuned.json", "loss.csv"):
            run.log_artifact(folder / name)
        run.finish()

    def edit(self, edit: EditRow) -> None:
        """One edit that was rendered now: its settings; its video and scores follow with the others'."""
        run = self._edit_run(edit.identity, edit.name)
        run.log_params(_edit_params(vars(edit)))
        run.set_tags(self._dvc_hashes("decode", "encode", "tune", "invert"))
        run.finish()
        if not self._watched:  # Not before: a batch whose first row cannot be rendered may be a mistake, with no run.
            self._watched = True
            self._while_working.enter_context(system_metrics(self.pipeline))

    def scores(self) -> None:
        """The scores of each edit, their means, and the contact sheet.

        An edit that has no run under these parameters yet, because DVC restored it or only the scoring has changed, gets
        one with its settings and its video.
        """
        metrics = read_json(self.project.scores(self.clip) / "metrics.json")
        for name, values in read_scores(self.project.scores(self.clip)).items():
            record = read_json(self.project.edits(self.clip) / f"{name}.json")
            run = self._edit_run(record["identity"], name)
            run.log_params(_edit_params(record))
            run.log_artifact(self.project.edits(self.clip) / f"{name}.mp4")
            run.log_metrics(values)
            run.finish()
        self.pipeline.log_metrics(metrics["mean"])
        self.pipeline.log_metrics({f"source.{name}": value for name, value in metrics["source"].items()})
        self.pipeline.set_tags(self._dvc_hashes("decode", "encode", "tune", "invert", "edit"))
        self.pipeline.log_artifact(self.project.scores(self.clip) / "scores.csv")
        self.pipeline.log_artifact(self.project.contact_sheet(self.clip))

    def _edit_run(self, identity: str, name: str) -> Run:
        return self.pipeline.child("edit", identity, f"edit {name}")

    def _dvc_hashes(self, *stages: str) -> dict[str, str]:
        """What DVC calls the video and the outputs of these stages, as tags."""
        try:
            locked = yaml.safe_load((self.root / "dvc.lock").read_text(encoding="utf-8"))["stages"]
        except (OSError, yaml.YAMLError, KeyError, TypeError):
            return {}
        tags = {}
        for stage in stages:
            entry = locked.get(f"{stage}@{self.clip}", {})
            if stage == "decode" and entry.get("deps"):
                tags["dvc.video"] = entry["deps"][0].get("md5", "")
            if entry.get("outs"):
                tags[f"dvc.{stage}"] = entry["outs"][0].get("md5", "")
        return tags

    def _timings(self) -> dict[str, float]:
        path = self.project.timings(self.clip)
        return read_json(path) if path.exists() else {}


def _ended(error: BaseException) -> Literal["FAILED", "KILLED"]:
    """A run ends by a failure, or from outside: by Ctrl-C, or Prefect's signal that it is cancelled."""
    return "FAILED" if isinstance(error, Exception) else "KILLED"


def _edit_params(settings: dict[str, Any]) -> dict[str, Any]:
    names = ("name", "prompt", "category", "negative_prompt", "guidance_scale", "steps", "seed")
    return {name: settings[name] for name in names}
