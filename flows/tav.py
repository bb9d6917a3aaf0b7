"""The flow `tav`: the six stages for each clip, one task run each, and one for each row of the prompt CSV.

What is up to date by DVC's lock file is not run, what DVC has in its cache is restored, and what was run is committed to
DVC: after this flow `dvc repro` has nothing to do, and the other way round.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run, task_run
from prefect.states import Completed, Failed, State

from flows.artifacts import ProgressArtifact, publish_results
from flows.ray_rows import render_rows as render_rows_on_ray
from tasks.clip_stages import ClipStages
from tasks.rows import RowBatch
from tav.config import load_params, write_overrides
from tav.config.prompts import EditRow
from tav.config.stages import STAGES
from tav.reports.report import update_reports
from tav.runtime.devices import is_out_of_memory
from tav.runtime.progress import Progress
from tav.versioning.dvc_pipeline import DvcPipeline
from tav_model.errors import FullDiskError, TavError, first_line

if TYPE_CHECKING:
    from prefect import Task
    from prefect.client.schemas.objects import TaskRun


class Watcher(Protocol):
    """Who wants to know, in the process that runs the flow, how far it is; see `watched_by`."""

    def stage(self, clip: str, stage: str, event: str) -> None:
        """`event`: up to date, begins, restored or done."""

    def ended(self, clip: str, error: str | None) -> None:
        """All of the clip is up to date, or why it is not."""


_watchers: list[Watcher] = []


@contextlib.contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Meanwhile, tell `watcher` of the flow's runs in this process."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def _tell(clip: str, stage: str, event: str) -> None:
    for watcher in _watchers:
        watcher.stage(clip, stage, event)


def _tell_ended(clip: str, error: str | None = None) -> None:
    for watcher in _watchers:
        watcher.ended(clip, error)


def transient(_task: Task, _run: TaskRun, state: State) -> bool:
    """Whether trying again may help: after trouble with files or memory, not after a mistake in what was given.

    The stages themselves go on with less at a time when memory does not suffice; a retry is for memory that another
    process has given back by then.
    """
    return isinstance(state.data, OSError) or (isinstance(state.data, Exception) and is_out_of_memory(state.data))


NO_ROOM = "NoRoom"  # the name of a state
RETRIES: dict[str, Any] = {
    "retries": 2,
    "retry_delay_seconds": [2, 10],
    "retry_condition_fn": transient,
    "cache_policy": NO_CACHE,
}


def _row_name() -> str:
    return f"edit: {task_run.parameters['edit'].prompt}"


def _flow_name() -> str:
    clips = flow_run.parameters.get("clips")
    return f"{', '.join(clips) if clips else 'all clips'} ({flow_run.scheduled_start_time:%Y-%m-%d %H:%M:%S})"


@task(task_run_name="{stage}: {clip}", **RETRIES)
def run_stage(stage: str, clip: str, root: Path) -> State | None:
    """One stage of one clip. A user's mistake or a full disk is a failed state with one line, not a traceback."""
    try:
        ClipStages(root, clip, on_progress=ProgressArtifact(f"{stage} {clip}")).run(stage)
        if stage == "score":
            update_reports(root, clip)
    except (TavError, FullDiskError) as error:
        return Failed(message=str(error))
    return Completed(message=f"{stage} of {clip} done")


@task(name="edit row", task_run_name=_row_name, **RETRIES)
def render_row(batch: RowBatch, edit: EditRow, stages: ClipStages, progress: Progress) -> State | None:
    """One row of the prompt CSV, into the store of rendered rows."""
    shown = ProgressArtifact(f"{stages.clip} {edit.name}")
    done = 0

    def on_step(steps: int) -> None:
        nonlocal done
        done += steps
        progress.update(steps)
        shown(done, edit.steps, {})

    try:
        batch.render(edit, on_step)
    except TavError as error:
        return Failed(message=str(error))
    except FullDiskError as error:
        return Failed(name=NO_ROOM, message=str(error))
    stages.runs.edit(edit)
    return Completed(message=f"{edit.name}: {edit.prompt}")


def edit_rows(clip: str, root: Path) -> None:
    """The stage `edit` with a task run for each row that is to do; rows that fail, fail alone."""
    stages = ClipStages(root, clip)
    on_ray = stages.params.runtime.ray is not None
    stages.alone = not on_ray
    with stages.session("edit"):
        batch = stages.edit_batch()
        todo = batch.todo()
        with stages.edit_progress(todo) as progress:
            if todo and on_ray:
                failed = render_rows_on_ray(stages, batch, todo, progress, RETRIES)
            else:
                failed = _render_rows(stages, batch, todo, progress)
        batch.finish(failed)


def _render_rows(stages: ClipStages, batch: RowBatch, todo: list[EditRow], progress: Progress) -> dict[str, str]:
    """Render them here, one after the other; returns the reasons of those that failed, by name."""
    if todo:
        batch.pipeline  # noqa: B018 (a model that cannot be loaded is no fault of a row)
    failed = {}
    for edit in todo:
        state = render_row(batch, edit, stages, progress, return_state=True)
        if state.name == NO_ROOM:
            raise TavError(state.message)  # No fault of a row; those that are done are found by the next run.
        if not state.is_completed():
            failed[edit.name] = str(state.message or state.name)
    return failed


def run_clip(clip: str, root: Path, versions: DvcPipeline) -> dict[str, Any]:
    """Bring one clip up to date; returns its mean scores.

    Raises:
        TavError: a stage has failed.
    """
    logger = get_run_logger()
    anything = False
    for stage in STAGES:
        if versions.is_current(stage, clip):
            logger.info("%s: %s is up to date", clip, stage)
            _tell(clip, stage, "up to date")
            continue
        anything = True
        _tell(clip, stage, "begins")
        if versions.restore(stage, clip):
            logger.info("%s: %s restored from DVC's cache", clip, stage)
            _tell(clip, stage, "restored")
            continue
        before = versions.snapshot(stage, clip)
        if stage == "edit":
            edit_rows(clip, root)
        else:
            state = run_stage.with_options(name=stage)(stage, clip, root, return_state=True)
            if not state.is_completed():
                raise TavError(state.message or f"{stage}: {state.name}")
        versions.commit(stage, clip, before)
        logger.info("%s: %s done", clip, stage)
        _tell(clip, stage, "done")
    if anything:
        publish_results(clip, root)
    scores = json.loads((ClipStages(root, clip).project.scores(clip) / "metrics.json").read_text(encoding="utf-8"))
    return scores["mean"]


@flow(name="tav", flow_run_name=_flow_name)
def tav(
    clips: list[str] | None = None, prompts: str | None = None, overrides: dict[str, Any] | None = None
) -> State | dict[str, dict[str, Any]]:
    """Edit clips by the prompts in their CSVs: decode, encode, tune, invert, edit, score.

    Args:
        clips: Names of clips in params.yaml. Empty: all of them.
        prompts: Path of a prompt CSV in the project to use for these clips. It is written to params.yaml.
        overrides: Parameters to change, by dotted key, such as {"tune.steps": 300, "attention.spatial": ["first"]}.
            They are written to params.yaml, as `dvc exp run -S` does, so that DVC knows what the results stand on.
    """
    logger = get_run_logger()
    root = Path.cwd()
    try:
        chosen = _choose(root, clips, prompts, overrides or {})
    except TavError as error:
        return Failed(message=str(error))
    versions = DvcPipeline(root)
    scores, failed = {}, {}
    for clip in chosen:
        try:
            scores[clip] = run_clip(clip, root, versions)
            logger.info("%s: %s", clip, ", ".join(f"{name} {value:.4f}" for name, value in scores[clip].items()))
        except (TavError, FullDiskError) as error:
            failed[clip] = first_line(error)
            logger.error("%s: %s", clip, error)
        _tell_ended(clip, failed.get(clip))
    if failed:
        return Failed(message="; ".join(f"{clip}: {reason}" for clip, reason in failed.items()))
    return scores


def _choose(root: Path, clips: list[str] | None, prompts: str | None, overrides: dict[str, Any]) -> list[str]:
    """The clips to work on, after the overrides are written to params.yaml."""
    path = root / "params.yaml"
    params = load_params(path)
    chosen = clips or list(params.clips)
    for clip in chosen:
        params.clip(clip)
    if prompts is not None:
        overrides = {**overrides, **{f"clips.{clip}.prompts": prompts for clip in chosen}}
    if overrides:
        write_overrides(path, overrides)
    return chosen
