"""The seven stages of a clip, with their files and parameters filled in: what `dvc repro` and the Prefect flow both run."""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.edit import edit
from tasks.rows import RowBatch
from tasks.source_settings import Source
from tasks.stage_control import StageControl
from tav.config import load_params
from tav.config.paths import Project, project_path, resolve_model
from tav.config.prompt_words import load_vocabulary, unknown_words_warning
from tav.config.results import read_record
from tav.config.stages import DEVICE_STAGES
from tav.runtime.devices import DevicePool, Slot, choose_devices
from tav.runtime.events import Event, EventStream, RowFinished, StageFailed, StageFinished, StageStarted
from tav.runtime.locks import Locked, file_lock, lock_holder
from tav.runtime.logs import stage_log
from tav.runtime.progress import Progress
from tav.tracking.clip_runs import ClipRuns
from tav.versioning.metric_files import list_scores
from tav_model.digests import digest
from tav_model.disk_space import explained_full_disk
from tav_model.errors import TavError
from tav_model.files import read_json, write_problem

if TYPE_CHECKING:
    import numpy as np

    from tav.config.prompts import EditRow, PromptRow

logger = logging.getLogger(__name__)

SHEET_ROWS, SHEET_COLUMNS = 24, 8  # Larger contact sheets are unreadable.


def clip_holder(root: Path, clip: str) -> dict[str, Any] | None:
    """Return which process works on the clip now, as `{"process": 123, "stage": "tune"}`; None where none does."""
    return lock_holder(_lock_path(Project(root), clip))


def in_use(root: Path, clip: str, what: str) -> str | None:
    """Return which process works on the clip now, as the reason that `what` is refused; None where none does."""
    holder = clip_holder(root, clip)
    return None if holder is None else _refusal(clip, what, holder)


def unwritable(root: Path, clip: str, what: str, folder: Path) -> str | None:
    """Return why the results of a clip cannot be written to a folder, in one line; None where they can.

    Args:
        root: the project's folder.
        clip: the clip.
        what: the stage, or what else would write them.
        folder: in the project.
    """
    problem = write_problem(folder)
    if problem is None:
        return None
    return f"{what}: the results of the clip {clip} cannot be written to {folder.relative_to(root)}: {problem}"


def _refusal(clip: str, what: str, holder: Mapping[str, Any]) -> str:
    who = f"process {holder['process']} (stage {holder['stage']})" if holder else "another process"
    return f"{what}: the clip {clip} is in use by {who}; wait for it"


def _lock_path(project: Project, clip: str) -> Path:
    return project.work / "locks" / f"{clip}.lock"


class ClipStages:
    """The stages of one clip of the project in `root`, by the params.yaml that is there now.

    Args:
        events: receives what happens; by default nobody does.
        pool: the devices to compute on; by default those that the parameters name.
        priority: among stages that wait for a device; the lowest is first.
        tags: further tags of the MLflow runs, such as the id of a Prefect flow run.

    Raises:
        TavError: parameters that are not allowed, or no such clip.
    """

    def __init__(
        self,
        root: Path,
        clip: str,
        events: EventStream | None = None,
        pool: DevicePool | None = None,
        priority: int = 0,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        self.root, self.clip, self.priority = root, clip, priority
        self.events = events or EventStream()
        self._given_pool = pool
        self._log_mutex = threading.Lock()
        self.project = Project(root)
        self._all_params = load_params(root / "params.yaml")
        self.params = self._all_params.for_clip(clip)
        self.settings = self.params.clip(clip)
        self.runs = ClipRuns(root, clip, self.params, tags)

    @cached_property
    def pool(self) -> DevicePool:
        """The devices to compute on."""
        return self._given_pool or DevicePool(choose_devices(self.params.runtime.device))

    @cached_property
    def base(self) -> str:
        """The folder or hub id of the base model."""
        return resolve_model(self.root, self.params.base_model)

    def run(self, stage: str, slot: Slot | None = None) -> None:
        """Run one stage, on the device of `slot` where the caller holds one, else on the first that is free.

        Raises:
            TavError: another process works on the clip, or a user's mistake in what the stage reads.
            FullDiskError: the disk is full.
        """
        with self.session(stage, slot) as device:
            if stage == "decode":
                self.decode()
            else:
                getattr(self, stage)(device)

    @contextlib.contextmanager
    def session(self, stage: str, slot: Slot | None = None) -> Iterator[str]:
        """Prepare what a stage runs in, and yield the device to compute on.

        No other process works on the clip meanwhile; the stage has its log; subscribers and MLflow receive how it ends.

        Raises:
            TavError: another process works on the clip.
        """
        with self.prepared(stage, stage), self._device(stage, slot) as device, self.reported(stage):
            yield device

    def needs_device(self, stage: str) -> bool:
        """Return whether a stage holds a device. Encoding on a CPU does not: another clip may be tuned meanwhile."""
        if stage == "annotate":
            return any(one.annotator is not None for one in self.params.control)
        return stage in DEVICE_STAGES and (stage != "encode" or self.pool.devices[0] != "cpu")

    @contextlib.contextmanager
    def _device(self, stage: str, slot: Slot | None) -> Iterator[str]:
        if slot is not None:
            yield slot.device
        elif not self.needs_device(stage):
            yield "cpu"
        else:
            with self.pool.hold(self.priority, check=self.events.check) as held:
                yield held.device

    @contextlib.contextmanager
    def quick_session(self) -> Iterator[Slot]:
        """Prepare what quick edits run in: as `session`, but nothing is logged to MLflow."""
        folder = self.project.quick(self.clip)
        with self.prepared("quick edits", "quick", folder), self.pool.hold(self.priority) as slot:
            yield slot

    @contextlib.contextmanager
    def prepared(self, what: str, log: str, folder: Path | None = None) -> Iterator[None]:
        """Hold the clip's lock, and keep the log `logs/CLIP/LOG.log`; errors of a full disk name the project.

        Args:
            what: the stage, for messages.
            log: the name of the log.
            folder: where the results go; by default the clip's results folder.

        Raises:
            TavError: another process works on the clip, or its results cannot be written.
        """
        path = self.project.log(self.clip, log)
        with explained_full_disk(self.root), self._locked(what), stage_log(path, self.events, self.clip):
            # Before hours of work whose results would go there.
            reason = unwritable(self.root, self.clip, what, folder or self.project.results(self.clip))
            if reason is not None:
                raise TavError(reason)
            yield

    @contextlib.contextmanager
    def reported(self, stage: str) -> Iterator[None]:
        """Publish that a stage starts, finishes or fails, and log it to MLflow."""
        started = time.monotonic()
        self.events.publish(StageStarted(clip=self.clip, stage=stage))
        try:
            with self.events.subscribed(self._log_row), self.runs.reporting(stage):
                yield
        except BaseException as error:
            self.events.publish(StageFailed(clip=self.clip, stage=stage, error=error))
            raise
        self.events.publish(StageFinished(clip=self.clip, stage=stage, seconds=time.monotonic() - started))

    def _log_row(self, event: Event) -> None:
        if isinstance(event, RowFinished) and event.clip == self.clip:
            with self._log_mutex:  # Rows finish in several threads.
                self.runs.edit(event.edit)

    @contextlib.contextmanager
    def _locked(self, stage: str) -> Iterator[None]:
        try:
            with file_lock(_lock_path(self.project, self.clip), stage=stage):
                yield
        except Locked as error:
            raise TavError(_refusal(self.clip, stage, error.holder)) from None

    # The stages

    def decode(self) -> None:
        """Write the frames of the clip to `results/CLIP/frames`."""
        from tasks.decode import decode

        video = project_path(self.root, self.settings.video, f"params.yaml: clips.{self.clip}.video")
        decode(video, self.project.frames(self.clip), self.params.decode)

    def encode(self, device: str) -> None:
        """Write the latents and text embeddings to `results/CLIP/latents`."""
        from tasks.encode import encode

        encode(
            self.project.frames(self.clip),
            self.project.latents(self.clip),
            base=self.base,
            caption=self.settings.caption,
            params=self.params.encode,
            device=device,
            chunk=self.params.runtime.decode_chunk,
            progress=self._progress("encode", None, "frame"),
        )

    def annotate(self, device: str) -> None:
        """Write the conditions of control networks to `results/CLIP/control`."""
        from tasks.annotate import annotate

        progress = self._progress("annotate", None, "frame")
        annotate(self.root, self.clip, self._all_params, device=device, progress=progress)

    def control(self, stage: str) -> StageControl:
        """Return the control that acts in a stage, as `annotate` has written it.

        Raises:
            TavError: there should be one, but the clip is not annotated.
        """
        folder = self.project.control(self.clip)
        if not folder.is_dir() and any(stage in one.stages for one in self.params.control):
            raise TavError(f"{self.clip}: its control is not computed yet; tav run {self.clip} does it")
        return StageControl.read(self.root, folder, stage)

    def is_tuned_under_control(self) -> bool:
        """Return whether the parameters or the latest results have control networks act in the tuning."""
        return any("tune" in one.stages for one in self.params.control) or bool(self.control("tune"))

    def tune(self, device: str) -> None:
        """Write the tuned weights to `results/CLIP/tuned`."""
        from tasks.tune import tune

        params = self.params
        with self.runs.tuning() as curve, self.events.subscribed(curve):
            tune(
                self.project.latents(self.clip),
                self.project.tuned(self.clip),
                base=self.base,
                base_name=params.base_model,
                attention=params.attention,
                params=params.tune,
                seed=params.seed,
                device=device,
                gradient_checkpointing=params.runtime.gradient_checkpointing,
                compile=params.runtime.compile,
                deterministic=params.runtime.deterministic,
                checkpoints=self.project.work / "checkpoints" / self.clip,
                checkpoint_every=params.runtime.checkpoint_every,
                progress=self._progress("tune", params.tune.steps, "step"),
                control=self.control("tune"),
                window=params.window,
            )

    def resume_step(self) -> int | None:
        """Return the step of the checkpoint that the tuning would resume from; None where it would begin."""
        from tasks.tune import resume_step

        return resume_step(
            self.project.latents(self.clip),
            self.project.work / "checkpoints" / self.clip,
            base_name=self.params.base_model,
            attention=self.params.attention,
            params=self.params.tune,
            seed=self.params.seed,
            control=self.control("tune"),
            window=self.params.window,
        )

    def invert(self, device: str) -> None:
        """Write the inverted latents to `results/CLIP/inverted`."""
        from tasks.invert import invert

        invert(
            self.project.latents(self.clip),
            self.project.tuned(self.clip),
            self.project.inverted(self.clip),
            base=self.base,
            attention=self.params.attention,
            params=self.params.invert,
            device=device,
            progress=self._progress("invert", self.params.invert.steps, "step"),
            control=self.control("invert"),
            window=self.params.window,
            compile=self.params.runtime.compile,
        )

    def edit(self, device: str) -> None:
        """Render the rows of the clip's prompt CSV into `results/CLIP/edits`."""
        edit(self.edit_batch(device), self.events, self.clip)

    def edit_batch(self, device: str) -> RowBatch:
        """Return the rows of the clip's prompt CSV, to be rendered on `device`."""
        return self._batch(self.prompt_rows(), self.project.edits(self.clip), base=self.base, device=device)

    def quick_batch(self, rows: Sequence[PromptRow], device: str) -> RowBatch:
        """Return edits beside those of the CSV, which finds what the stage `edit` has rendered."""
        found_in = (self.project.edits(self.clip),)
        out = self.project.quick(self.clip)
        return self._batch(rows, out, base=self.base, device=device, found_in=found_in)

    def rows_to_render(self) -> list[EditRow]:
        """Return the rows of the CSV that the stage `edit` would render, for the inputs as they are now.

        Nothing is written, and nothing of the base model is read: it is assumed to be the one that was tuned.
        """
        return self._read_only_batch(self.prompt_rows()).to_render()

    def edit_rows(self) -> list[EditRow]:
        """Return the rows of the CSV with every setting resolved, under the assumption of `rows_to_render`."""
        return self._read_only_batch(self.prompt_rows()).rows

    def _read_only_batch(self, rows: Sequence[PromptRow]) -> RowBatch:
        tuned = read_json(self.project.tuned(self.clip) / "tuned.json")
        return self._batch(
            rows,
            self.project.edits(self.clip),
            base=self.params.base_model,
            device="cpu",
            base_identity=tuned["base_digest"],
            adopt=False,
        )

    def prompt_rows(self) -> list[PromptRow]:
        """Read the clip's prompt CSV. Raises TavError where it is wrong."""
        from tav.config.prompts import read_prompts

        what = f"params.yaml: clips.{self.clip}.prompts"
        return read_prompts(project_path(self.root, self.settings.prompts, what))

    def unknown_words_warning(self) -> str | None:
        """Return one line on what the base model does not know of the caption and the prompts; None if there is nothing.

        A prompt CSV that is invalid is left to the stage that reads it.
        """
        texts = [self.settings.caption]
        with contextlib.suppress(TavError):
            texts += [row.prompt for row in self.prompt_rows()]
        return unknown_words_warning(self.root, self.params.base_model, texts)

    def _batch(self, rows: Sequence[PromptRow], out: Path, **others: Any) -> RowBatch:
        return RowBatch(
            rows,
            self.project.inverted(self.clip),
            self.project.tuned(self.clip),
            out,
            root=self.root,
            attention=self.params.attention,
            params=self.params.edit,
            seed=self.params.seed,
            store=self.project.work / "rows" / self.clip,
            batch_size=self.params.runtime.edit_batch,
            decode_chunk=self.params.runtime.decode_chunk,
            compile=self.params.runtime.compile,
            source=self._source(),
            control=self.control("edit"),
            window=self.params.window,
            vocabulary=load_vocabulary(self.root, self.params.base_model),
            **others,
        )

    def _source(self) -> Source:
        return Source(
            self.root,
            self.project.inverted(self.clip),
            self.settings.caption,
            self.project.frames(self.clip),
            self.params.decode,
        )

    def score(self, device: str) -> None:
        """Write the scores to `results/CLIP/scores`, the contact sheet, and the tuned model to MLflow."""
        from tasks.score import score
        from tav.media.scene_truth import load_clip_truth

        truth, indexes = load_clip_truth(self.root, self.clip, self.params)
        score(
            self.project.frames(self.clip),
            self.project.edits(self.clip),
            self.project.scores(self.clip),
            caption=self.settings.caption,
            params=self.params.score,
            resolve_model=lambda name: resolve_model(self.root, name),
            device=device,
            truth=truth,
            indexes=indexes,
            progress=self._progress("score", None, "video"),
            kept=self._source().kept_pixels,
        )
        self.score_quick(device)
        self._contact_sheet()
        list_scores(self.root, self.clip, self.params.clips)
        self.runs.scores()
        if self.params.tracking.log_model:
            self._log_model()

    def score_quick(self, device: str) -> None:
        """Score the quick edits that were rendered from the present tuning and inversion, as far as they can be scored.

        Why one cannot is logged: nothing but the report depends on their scores.
        """
        from tasks.quick_scores import score_quick_edits

        if not self.project.quick(self.clip).is_dir():
            return
        try:
            score_quick_edits(
                self.project.quick(self.clip),
                self._current_quick_edits(),
                self.project.frames(self.clip),
                caption=self.settings.caption,
                params=self.params.score,
                resolve_model=lambda name: resolve_model(self.root, name),
                device=device,
                kept=self._source().kept_pixels,
            )
        except TavError as error:
            logger.warning("quick edits are not scored: %s", error)

    def _current_quick_edits(self) -> list[str]:
        """Return the names of the quick edits that would be found, not rendered again, if they were asked for now."""
        from tav.config.prompts import CONTENT_COLUMNS, PromptRow

        folder = self.project.quick(self.clip)
        records = {path.stem: read_record(path) for path in sorted(folder.glob("*.json"))}
        rows = []
        for name, record in records.items():
            content: dict[str, Any] = {key: record.get(key) for key in CONTENT_COLUMNS}
            if isinstance(content["prompt"], str) and (folder / f"{name}.mp4").is_file():
                rows.append(PromptRow(line=0, name=name, **content))
        inputs = (self.project.tuned(self.clip) / "tuned.json", self.project.inverted(self.clip))
        if not rows or not all(path.exists() for path in inputs):
            return []
        resolved = self._read_only_batch(rows).rows
        return [row.name for row in resolved if records[row.name].get("identity") == row.identity]

    def report(self) -> None:
        """Write the clip's report and the overview, and log the report to MLflow, after the stage `score` has ended."""
        from tav.reports.report import update_reports

        update_reports(self.root, self.clip)
        self.runs.report()

    def _contact_sheet(self) -> None:
        from tav.media.contact_sheet import write_contact_sheet
        from tav.reports.videos import ordered_edit_paths
        from tav_model.video import evenly_spaced, sample_video

        def frames(path: Path) -> np.ndarray:
            return sample_video(path, lambda available: evenly_spaced(available, min(available, SHEET_COLUMNS)))[0]

        rows = [(f"source: {self.settings.caption}", frames(self.project.frames(self.clip) / "source.mp4"))]
        for path in ordered_edit_paths(self.root, self.clip, self.params)[:SHEET_ROWS]:
            rows.append((read_json(path.with_suffix(".json"))["prompt"], frames(path)))
        write_contact_sheet(self.project.contact_sheet(self.clip), rows, SHEET_COLUMNS)

    def _log_model(self) -> None:
        """Log the tuned model, with everything that rendering a prompt needs.

        There is one for each tuning and inversion: a run that reuses them, with other settings of the section `edit`, is
        linked to the model of the run that they come from.
        """
        run = self.runs.pipeline
        if not run.tracked:
            return
        tuned, inverted = self.project.tuned(self.clip), self.project.inverted(self.clip)
        # Models of clips that are not divided keep their identity.
        windows = {"window"} if self.params.window.context_length else set()
        sections = self.params.model_dump_json(include={"base_model", "seed", "attention", *windows})
        control = self.control("edit")
        identity = digest(tuned / "tuned.json", inverted, sections, *([control.identity] if control else []))
        if run.link_model(identity):
            return
        folder = self.project.work / "mlflow" / self.clip / "model"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            with warnings.catch_warnings(action="ignore"):  # MLflow's advice to authors of models.
                from tasks import mlflow_model

                mlflow_model.save(
                    folder,
                    self.params,
                    tuned,
                    inverted,
                    self.project.frames(self.clip) / "frames.safetensors",
                    self.settings.caption,
                    control.folder if control else None,
                )
            run.log_model(folder, identity, mlflow_model.parameters(self.params))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _progress(self, stage: str, total: int | None, unit: str) -> Progress:
        return Progress(self.events, stage=stage, clip=self.clip, total=total, unit=unit)
