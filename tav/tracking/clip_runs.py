"""The MLflow runs of a clip's stages: a parent run for the pipeline, with child runs for the tuning and each edit."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tav.config import RESULT_SECTIONS, parse_params
from tav.config.dotted_keys import flatten
from tav.config.metrics import METRICS
from tav.config.paths import Project
from tav.config.results import decode_mask_image, read_scores
from tav.config.stages import TRACKED_STAGES
from tav.tracking.run_names import differs
from tav.tracking.stored_runs import EDITS, EDITS_DIGEST
from tav.tracking.system_metrics import peak_memory, system_metrics
from tav.tracking.tracker import Run, Tracker
from tav.tracking.tuning_steps import TuningSteps
from tav.versioning.lock_file import read_lock_file, recorded_hashes
from tav_model.digests import canonical_json, digest
from tav_model.errors import TavError
from tav_model.files import atomic_file, read_json, write_json
from tav_model.tensors import read_shapes

if TYPE_CHECKING:
    from tav.config import Params
    from tav.config.prompts import EditRow
    from tav.tracking.entries import Dataset, EndStatus

Settings: TypeAlias = dict[str, str | int | float]

EDIT_PARAMETERS = ("name", "prompt", "category", "negative_prompt", "guidance_scale", "steps", "seed", "preset", "mask")


class ClipRuns:
    """The MLflow runs of one clip with the current parameters. Nothing is imported before the first is needed."""

    def __init__(self, root: Path, clip: str, params: Params, tags: Mapping[str, str] | None = None) -> None:
        self.root, self.clip, self.params = root, clip, params.for_clip(clip)
        self.project = Project(root)
        self.tracker = Tracker(params.tracking.uri, params.tracking.experiment, root, tags)
        self._until_stage_ends = contextlib.ExitStack()
        self._is_monitored = False

    @cached_property
    def pipeline(self) -> Run:
        """The parent run, with every parameter; the score stage adds the mean scores and the contact sheet."""
        return self.tracker.pipeline(self.clip, self._settings(self.params), self._changes())

    def find(self) -> tuple[str, str] | None:
        """Return the ids of the experiment and of the parent run in the store, if both exist."""
        return self.tracker.find(self.clip, self._settings(self.params))

    def _settings(self, params: Params) -> Settings:
        """Return all parameters that determine the results, flat."""
        sections = params.for_clip(self.clip).model_dump(mode="json")
        settings = {name: sections[name] for name in RESULT_SECTIONS}
        if not settings["control"]:
            del settings["control"]  # The runs of earlier versions, which had none, are found by the same parameters.
        settings["caption"] = params.clip(self.clip).caption
        return flatten(settings)

    def _changes(self) -> Settings:
        """Return the settings that differ from the last commit's: what a sweep changes, and how its runs are named."""
        command = ["git", "show", "HEAD:./params.yaml"]
        try:
            text = subprocess.run(command, cwd=self.root, capture_output=True, timeout=10, check=True).stdout.decode()
            committed = self._settings(parse_params("params.yaml", text))
        except (OSError, subprocess.SubprocessError, UnicodeDecodeError, TavError):
            return {}  # not a repository, or its parameters are of another version
        settings = self._settings(self.params)
        return {name: value for name, value in settings.items() if differs(name, (value, committed.get(name)))}

    @contextlib.contextmanager
    def reporting(self, stage: str) -> Iterator[None]:
        """Record how long the stage takes and how it ends. Stages without a run of their own are logged by the score stage."""
        start = time.monotonic()
        try:
            with self.tracker, contextlib.ExitStack() as self._until_stage_ends:
                yield
        except BaseException as error:
            if "pipeline" in vars(self):  # An error before anything was logged needs no run.
                self.pipeline.finish(_end_status(error))
            raise
        timings = self._timings() | {stage: round(time.monotonic() - start, 3)}
        write_json(self.project.timings(self.clip), timings)
        if stage in TRACKED_STAGES:
            if stage == "score":  # After the scores, because MLflow's comparison shows first what was logged first.
                self.pipeline.log_metrics({f"seconds.{name}": seconds for name, seconds in timings.items()})
            self.pipeline.finish()

    @contextlib.contextmanager
    def tuning(self) -> Iterator[TuningSteps]:
        """Open the tuning's run for as long as the tuning lasts, and yield the subscriber that logs its steps."""
        run = self.pipeline.child("tune", "tune", f"tune {self.clip}")
        run.log_params(flatten({"tune": self.params.tune.model_dump(mode="json")}))
        for one in (run, self.pipeline):
            one.log_dataset(self._dataset("tuning"))
        try:
            with system_metrics(run, after_others=True):
                yield TuningSteps(run, self.clip)
        except BaseException as error:
            run.finish(_end_status(error))
            raise
        folder = self.project.tuned(self.clip)
        info = read_json(folder / "tuned.json")
        run.log_params({"tuned.parameters": info["parameters"]})
        run.log_metrics({"peak_memory_gib": peak_memory()})
        for step, loss in info.get("held_out_loss", []):
            run.log_metrics({"held_out_loss": loss}, step)
        run.set_tags({"tav.tuned.sha256": info["sha256"], **self._dvc_hashes("decode", "encode")})
        for name in ("tuned.json", "loss.csv"):
            run.log_artifact(folder / name)
        run.finish()

    def edit(self, edit: EditRow) -> None:
        """Log the settings of an edit that has just been rendered. The score stage adds its video and scores."""
        run = self._edit_run(edit.identity, edit.name)
        run.log_params(_edit_parameters(vars(edit)))
        run.set_tags(self._dvc_hashes("decode", "encode", "tune", "invert"))
        run.finish()
        # Not before the first edit: a batch whose first row cannot be rendered may be a mistake, which needs no run.
        if not self._is_monitored:
            self._is_monitored = True
            self._until_stage_ends.enter_context(self._monitored("edit"))

    @contextlib.contextmanager
    def _monitored(self, stage: str) -> Iterator[None]:
        """Log system metrics to a child run of the stage. In the parent run they would crowd out the scores."""
        run = self.pipeline.child("stage", stage, f"{stage} {self.clip}")
        try:
            with system_metrics(run):
                yield
        except BaseException as error:
            run.finish(_end_status(error))
            raise
        run.finish()

    def scores(self) -> None:
        """Log the scores of each edit, their means, and the contact sheet.

        An edit that has no run with these parameters yet, because DVC restored it or only the scoring has changed, gets
        one with its settings, its video and its mask.
        """
        metrics = read_json(self.project.scores(self.clip) / "metrics.json")
        prompts = {}
        for name, values in read_scores(self.project.scores(self.clip)).items():
            record = read_json(self.project.edits(self.clip) / f"{name}.json")
            prompts[name] = record["prompt"]
            run = self._edit_run(record["identity"], name)
            run.log_params(_edit_parameters(record))
            run.log_artifact(self.project.edits(self.clip) / f"{name}.mp4")
            if mask := decode_mask_image(record):
                path = self.project.work / "mlflow" / self.clip / "masks" / f"{name}.png"
                with atomic_file(path) as new:
                    new.write_bytes(mask)
                run.log_artifact(path, "mask")
            run.log_metrics(_in_catalogue_order(values))
            run.finish()
        self.pipeline.log_metrics(_in_catalogue_order(metrics["mean"]))
        self.pipeline.log_metrics({f"source.{name}": value for name, value in metrics["source"].items()})
        self.pipeline.log_dataset(self._dataset("tuning"))
        self.pipeline.set_tags(self._dvc_hashes("decode", "encode", "tune", "invert", "edit"))
        # Means are comparable where they are over the same edits.
        self.pipeline.set_tags({EDITS: str(len(prompts)), EDITS_DIGEST: digest(canonical_json(prompts))})
        self.pipeline.log_artifact(self.project.scores(self.clip) / "scores.csv")
        self.pipeline.log_artifact(self.project.contact_sheet(self.clip))
        for path in sorted(self.project.control(self.clip).glob("*.mp4")):
            self.pipeline.log_artifact(path, "control")

    def report(self) -> None:
        """Log the clip's report, which shows this configuration even when the next one replaces the file."""
        if (page := self.project.report(self.clip)).exists():
            self.pipeline.log_artifact(page)

    def _edit_run(self, identity: str, name: str) -> Run:
        return self.pipeline.child("edit", identity, f"edit {name}")

    def _dataset(self, context: str) -> Dataset:
        """Return the clip as a dataset: its frames, at the size and rate at which the stages read them."""
        frames = self.project.frames(self.clip) / "frames.safetensors"
        shapes, metadata = read_shapes(frames)
        count, height, width, _ = shapes["frames"]
        return {
            "name": self.clip,
            "digest": digest(frames),
            "source": self.params.clip(self.clip).video,
            "shape": shapes["frames"],
            "dtype": "uint8",
            "profile": {"frames": count, "height": height, "width": width, "fps": metadata["fps"]},
            "context": context,
        }

    def _dvc_hashes(self, *stages: str) -> dict[str, str]:
        """Return DVC's hashes of the video and of the first output of each stage, as tags."""
        recorded = read_lock_file(self.root)
        tags = {}
        for stage in stages:
            entry = recorded.get(f"{stage}@{self.clip}", {})
            inputs, outputs = (list(recorded_hashes(entry, kind).values()) for kind in ("deps", "outs"))
            if stage == "decode" and inputs:
                tags["dvc.video"] = inputs[0]
            if outputs:
                tags[f"dvc.{stage}"] = outputs[0]
        return tags

    def _timings(self) -> dict[str, float]:
        path = self.project.timings(self.clip)
        return read_json(path) if path.exists() else {}


def _end_status(error: BaseException) -> EndStatus:
    """Return FAILED for an error, and KILLED for an end from outside: Ctrl-C, or a run that Prefect cancels."""
    return "FAILED" if isinstance(error, Exception) else "KILLED"


def _edit_parameters(settings: Mapping[str, Any]) -> dict[str, Any]:
    scale = settings.get("control_scale")
    own = {} if scale is None else {"control_scale": scale}
    return {name: settings.get(name) for name in EDIT_PARAMETERS} | own


def _in_catalogue_order(values: Mapping[str, float]) -> dict[str, float]:
    """Return the scores in the catalogue's order: MLflow's comparison opens on what was logged first."""
    return {name: values[name] for name in (*METRICS, *values) if name in values}
