"""The six stages with their files and parameters filled in: what `dvc repro` and the Prefect flow both run."""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.rows import RowBatch
from tav.config import load_params
from tav.config.paths import Project, project_path, resolve_model
from tav.config.prompts import EditRow
from tav.config.stages import DEVICE_STAGES
from tav.runtime import locks
from tav.runtime.devices import exclusive_gpu
from tav.runtime.progress import Progress, stage_log
from tav.tracking.clip_runs import ClipRuns
from tav_model.digests import digest
from tav_model.disk_space import explained_full_disk
from tav_model.errors import TavError
from tav_model.files import read_json

if TYPE_CHECKING:
    from tav.config.prompts import PromptRow

SHEET_ROWS = 24  # More than that is no picture to look at.


def clip_holder(root: Path, clip: str) -> str | None:
    """Who works on the clip now, as `process 123 (stage tune)`; None: nobody."""
    return locks.holder(_lock_path(Project(root), clip))


def _lock_path(project: Project, clip: str) -> Path:
    return project.work / "locks" / f"{clip}.lock"


class ClipStages:
    """The stages of one clip of the project in `root`, by the params.yaml that lies there now.

    Args:
        on_progress: told of each stage's updates, as `tav.runtime.progress.Progress` tells them.
        alone: whether the stages hold the GPU for themselves; not where something else gives out shares of it, or
            another machine computes.

    Raises:
        TavError: parameters that are not allowed, or no such clip.
    """

    def __init__(
        self,
        root: Path,
        clip: str,
        on_progress: Callable[[int, int, dict[str, Any]], None] | None = None,
        alone: bool = True,
    ) -> None:
        self.root, self.clip, self.on_progress, self.alone = root, clip, on_progress, alone
        self.project = Project(root)
        self.params = load_params(root / "params.yaml")
        self.settings = self.params.clip(clip)
        self.runs = ClipRuns(root, clip, self.params)

    def run(self, stage: str) -> None:
        """Run one stage."""
        with self.session(stage):
            getattr(self, stage)()

    @contextlib.contextmanager
    def session(self, stage: str) -> Iterator[None]:
        """What a stage runs in: nobody else works on the clip or the GPU, its log is kept, MLflow is told how it ends."""
        with self._prepared(stage, stage):
            device = exclusive_gpu(self.device) if self.alone and stage in DEVICE_STAGES else contextlib.nullcontext()
            with device, self.runs.reporting(stage):
                yield

    @contextlib.contextmanager
    def quick_session(self) -> Iterator[None]:
        """What edits beside the pipeline run in: as `session`, but MLflow is told nothing."""
        with self._prepared("quick edits", "quick"), exclusive_gpu(self.device):
            yield

    @contextlib.contextmanager
    def _prepared(self, what: str, log: str) -> Iterator[None]:
        with explained_full_disk(self.root), self._locked(what), stage_log(self.project.log(self.clip, log)):
            yield

    @contextlib.contextmanager
    def _locked(self, stage: str) -> Iterator[None]:
        """Hold the clip's lock, which goes with the process, however that ends.

        Raises:
            TavError: another process holds it.
        """
        path = _lock_path(self.project, self.clip)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+") as file:
            if not locks.take(file, f"process {os.getpid()} (stage {stage})\n"):
                who = (clip_holder(self.root, self.clip) or "another process").strip()
                raise TavError(f"{stage}: the clip {self.clip} is being worked on by {who}; wait for it")
            yield

    # The stages

    def decode(self) -> None:
        from tasks.decode import decode

        video = project_path(self.root, self.settings.video, f"params.yaml: clips.{self.clip}.video")
        decode(video, self.project.frames(self.clip), self.params.decode_for(self.clip))

    def encode(self) -> None:
        from tasks.encode import encode

        frames = self.params.decode_for(self.clip).frames
        encode(
            self.project.frames(self.clip),
            self.project.latents(self.clip),
            base=self.base,
            caption=self.settings.caption,
            params=self.params.encode,
            device=self.device,
            chunk=self.params.runtime.decode_chunk,
            progress=self._progress("encode", frames, "frame"),
        )

    def tune(self) -> None:
        from tasks.tune import tune

        params = self.params
        with self.runs.tuning() as told:
            tune(
                self.project.latents(self.clip),
                self.project.tuned(self.clip),
                base=self.base,
                base_name=params.base_model,
                attention=params.attention,
                params=params.tune,
                seed=params.seed,
                device=self.device,
                gradient_checkpointing=params.runtime.gradient_checkpointing,
                checkpoints=self.project.work / "checkpoints" / self.clip,
                checkpoint_every=params.runtime.checkpoint_every,
                progress=self._progress("tune", params.tune.steps, "step"),
                on_step=told.step,
                on_resume=told.resumed,
            )

    def invert(self) -> None:
        from tasks.invert import invert

        invert(
            self.project.latents(self.clip),
            self.project.tuned(self.clip),
            self.project.inverted(self.clip),
            base=self.base,
            attention=self.params.attention,
            params=self.params.invert,
            device=self.device,
            progress=self._progress("invert", self.params.invert.steps, "step"),
        )

    def edit(self) -> None:
        from tasks.edit import edit

        batch = self.edit_batch()
        edit(batch, self.edit_progress(batch.todo()), on_done=self.runs.edit)

    def edit_batch(self) -> RowBatch:
        return self._batch(self.prompt_rows(), self.project.edits(self.clip), base=self.base, device=self.device)

    def quick_batch(self, rows: Sequence[PromptRow]) -> RowBatch:
        """Edits beside those of the CSV, with the same store: what one has rendered, the other does not render again."""
        found_in = (self.project.edits(self.clip),)
        out = self.project.quick(self.clip)
        return self._batch(rows, out, base=self.base, device=self.device, found_in=found_in)

    def rows_to_render(self) -> list[str]:
        """The names of the CSV's rows that the stage `edit` would render, for the inputs as they lie there now.

        Nothing is written, and of the base model nothing is read: it is taken for the one that was tuned.
        """
        tuned = read_json(self.project.tuned(self.clip) / "tuned.json")
        batch = self._batch(
            self.prompt_rows(),
            self.project.edits(self.clip),
            base=self.params.base_model,
            device="cpu",
            base_identity=tuned["base_digest"],
            adopt=False,
        )
        return [edit.name for edit in batch.to_render()]

    def prompt_rows(self) -> list[PromptRow]:
        from tav.config.prompts import read_prompts

        what = f"params.yaml: clips.{self.clip}.prompts"
        return read_prompts(project_path(self.root, self.settings.prompts, what))

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
            **others,
        )

    def edit_progress(self, edits: list[EditRow]) -> Progress:
        return self._progress("edit", sum(edit.steps for edit in edits), "step")

    def quick_progress(self, edits: list[EditRow]) -> Progress:
        return self._progress("edit", sum(edit.steps for edit in edits), "step", log="quick")

    def score(self) -> None:
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
            device=self.device,
            truth=truth,
            indexes=indexes,
            progress=self._progress("score", None, "video"),
        )
        self._contact_sheet()
        self.runs.scores()
        if self.params.tracking.log_model:
            self._log_model()

    def _contact_sheet(self) -> None:
        from tav.media.contact_sheet import write_contact_sheet
        from tav.media.videos import read_mp4

        edits = self.project.edits(self.clip)
        rows = [(f"source: {self.settings.caption}", read_mp4(self.project.frames(self.clip) / "source.mp4")[0])]
        for path in sorted(edits.glob("*.mp4"))[:SHEET_ROWS]:
            rows.append((read_json(path.with_suffix(".json"))["prompt"], read_mp4(path)[0]))
        write_contact_sheet(self.project.contact_sheet(self.clip), rows)

    def _log_model(self) -> None:
        """Log the tuned model, with everything that rendering a prompt needs, once per tuning and inversion."""
        run = self.runs.pipeline
        if not run.tracked:
            return
        tuned, inverted = self.project.tuned(self.clip), self.project.inverted(self.clip)
        sections = self.params.model_dump_json(include={"base_model", "seed", "attention", "edit"})
        identity = digest(tuned / "tuned.json", inverted, sections)
        if run.tag("tav.model") == identity:
            return
        folder = self.project.work / "mlflow" / self.clip / "model"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            with warnings.catch_warnings(action="ignore"):  # MLflow's advice to authors of models.
                from tasks import mlflow_model

                mlflow_model.save(folder, self.params, tuned, inverted)
            run.log_artifact(folder)
            run.set_tags({"tav.model": identity})
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    # What they share

    @cached_property
    def base(self) -> str:
        return resolve_model(self.root, self.params.base_model)

    @cached_property
    def device(self) -> str:
        from tav.runtime.devices import choose_device

        return choose_device(self.params.runtime.device)

    def _progress(self, stage: str, total: int | None, unit: str, log: str | None = None) -> Progress:
        path = self.project.log(self.clip, log or stage)
        return Progress(f"{stage} {self.clip}", total=total, unit=unit, log=path, on_update=self.on_progress)
