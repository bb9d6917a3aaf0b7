"""The flow `tav`: the stages of each clip as a graph of task runs, with a task run for each row of the prompt CSV.

    decode → encode → tune → invert → edit (a task run per row) → score
          ↘ annotate ↗

DVC decides what is out of date. A stage whose outputs are up to date, or come back from DVC's cache, is a task run in the
state `Cached`, so that the graph is always complete; what has run is committed to DVC. After this flow `dvc repro` has
nothing to do, and the other way round.
"""

from __future__ import annotations

import contextlib
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows.artifacts import ProgressArtifacts, ProgressLogs, publish_results
from flows.edit_rows import EditRows, run_row
from flows.observers import observers
from flows.pipeline_run import RETRIES, PipelineRun, cached, interrupted
from flows.ray_rows import render_rows_on_ray
from tasks.model_loading import import_libraries
from tav.config import load_params, write_overrides
from tav.config.metrics import headlines_text
from tav.reports.report import refresh_reports
from tav.runtime.devices import DevicePool, Slot, choose_devices
from tav.runtime.events import ClipFinished, EventStream, Stopped
from tav.runtime.progress import clock
from tav_model.errors import FullDiskError, TavError, first_line
from tav_model.files import read_json

logger = logging.getLogger(__name__)


def _flow_name() -> str:
    clips = flow_run.parameters.get("clips")
    return f"{', '.join(clips) if clips else 'all clips'} ({flow_run.scheduled_start_time:%Y-%m-%d %H:%M:%S})"


@flow(name="tav", flow_run_name=_flow_name)
def tav(
    clips: list[str] | None = None, prompts: str | None = None, overrides: dict[str, Any] | None = None
) -> State[Any] | dict[str, dict[str, Any]]:
    """Edit clips by the prompts in their CSVs: decode, encode, annotate, tune, invert, edit, score.

    Args:
        clips: Names of clips in params.yaml. Empty: all of them.
        prompts: Path of a prompt CSV in the project to use for these clips. It is written to params.yaml.
        overrides: Parameters to change, by dotted key, for all clips or for one, such as
            {"tune.steps": 300, "clips.ball.attention.spatial": ["first"]}. They are written to params.yaml, as
            `dvc exp run -S` does, so that DVC knows what the results depend on.
    """
    root = Path.cwd()
    try:
        chosen = _choose(root, clips, prompts, overrides or {})
        pool = DevicePool(choose_devices(load_params(root / "params.yaml").runtime.device))
    except (TavError, FullDiskError) as error:
        return Failed(message=str(error))
    events = EventStream(ProgressArtifacts(), ProgressLogs(), *observers())
    run = PipelineRun(root, chosen, events, pool, {"prefect.flow_run_id": str(flow_run.id)})

    try:
        failures = _run_clips(run)
    except KeyboardInterrupt:
        return interrupted()
    failed = {clip: reason for clip, reason in zip(chosen, failures, strict=True) if reason is not None}
    if failed:
        return Failed(message="; ".join(f"{clip}: {reason}" for clip, reason in failed.items()))
    return {clip: _mean_scores(run, clip) for clip in chosen}


def _run_clips(run: PipelineRun) -> list[str | None]:
    """Bring all clips up to date; return for each None, or why it failed."""
    # The next clip is decoded and encoded while the devices work on the ones before it.
    with ThreadPoolExecutor(max_workers=len(run.pool) + 1, thread_name_prefix="clip") as executor:
        running = [executor.submit(copy_context().run, run_clip, run, clip) for clip in run.clips]
        try:
            return [one.result() for one in running]
        except BaseException:  # The flow run is cancelled or interrupted.
            logger.warning("stopping after the present step; what is done is kept")
            run.events.stop()
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def _choose(root: Path, clips: list[str] | None, prompts: str | None, overrides: dict[str, Any]) -> list[str]:
    """Return the clips to work on, after the overrides are written to params.yaml."""
    path = root / "params.yaml"
    params = load_params(path)
    chosen = list(dict.fromkeys(clips or params.clips))
    for clip in chosen:
        params.clip(clip)
    if prompts is not None:
        overrides = {**overrides, **{f"clips.{clip}.prompts": prompts for clip in chosen}}
    if overrides:
        choose_devices(load_params(path, overrides).runtime.device)  # A device that is missing is not written.
        write_overrides(path, overrides)
    return chosen


def run_clip(run: PipelineRun, clip: str) -> str | None:
    """Bring one clip up to date. Return None, or the reason it failed in one line."""
    logger = get_run_logger()
    error = None
    try:
        run.events.check()
        if warning := run.stages(clip).unknown_words_warning():
            logger.warning("%s: %s", clip, warning)
        has_changed = _run_stages(run, clip)
        refresh_reports(run.root, clip)
        if has_changed:
            publish_results(clip, run.root)
        stages = run.stages(clip)
        report = stages.project.report(clip).relative_to(run.root)
        logger.info("%s: %s; report: %s", clip, headlines_text(_mean_scores(run, clip)), report)
    except (TavError, FullDiskError) as failure:
        error = first_line(failure)
        logger.error("%s: %s", clip, failure)
    except Exception as failure:  # A defect in the work on one clip does not stop the others.
        error = first_line(failure)
        logger.exception("%s: %s", clip, error)
    run.events.publish(ClipFinished(clip=clip, stage="", error=error))
    return error


def _run_stages(run: PipelineRun, clip: str) -> bool:
    """Run the graph of one clip. Return whether any stage was out of date.

    Raises:
        TavError: a stage has failed.
    """
    frames = _run_stage("decode", clip, run)
    latents = _run_stage("encode", clip, run, frames)
    control = _run_stage("annotate", clip, run, frames)
    tuned = _run_stage("tune", clip, run, latents, control)
    inverted = _run_stage("invert", clip, run, latents, control, tuned)
    edits = EditRows(run, clip)
    with edits.session():
        rows = _run_rows(edits, tuned, inverted)
    score = _run_stage("score", clip, run, frames, *rows)
    return any(one.state.name != "Cached" for one in (frames, latents, control, tuned, inverted, *rows, score))


def _run_stage(stage: str, clip: str, run: PipelineRun, *inputs: PrefectFuture[Any]) -> PrefectFuture[Any]:
    """Run the task of one stage, once a device is free if it needs one; return its completed future.

    Raises:
        TavError: it has not completed.
        Stopped: it was interrupted.
    """
    why = run.restore_if_possible(stage, clip)
    stages = run.stages(clip)
    waits = why is None and stages.needs_device(stage)
    with run.pool.hold(stages.priority, check=run.events.check) if waits else contextlib.nullcontext() as slot:
        run.events.check()
        future = run_stage.with_options(name=stage).submit(stage, clip, run, list(inputs), why, slot)
        future.wait()
    if future.state.is_cancelled():
        raise Stopped
    if not future.state.is_completed():
        raise TavError(future.state.message or future.state.name or "not completed")
    return future


def _run_rows(edits: EditRows, tuned: PrefectFuture[Any], inverted: PrefectFuture[Any]) -> list[PrefectFuture[Any]]:
    """Run a task for each row, as many at once as there are devices.

    Raises:
        TavError: the disk is full, or the Ray cluster cannot be reached.
    """
    if edits.stages.params.runtime.ray is not None:
        return render_rows_on_ray(edits, tuned, inverted)
    with ThreadPoolExecutor(len(edits.run.pool), thread_name_prefix="row") as executor:
        running = [executor.submit(copy_context().run, run_row, edits, row, tuned, inverted) for row in edits.rows]
        try:
            return [one.result() for one in running]
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


@task(task_run_name="{stage}: {clip}", **RETRIES)
def run_stage(
    stage: str, clip: str, run: PipelineRun, inputs: list[Any], why_cached: str | None, slot: Slot | None
) -> State[None]:
    """Run one stage of one clip, and commit it to DVC.

    A user's mistake and a full disk are failed states of one line, not a traceback.

    Args:
        stage: the stage.
        clip: the clip.
        run: the run of the flow.
        inputs: the task runs that this one depends on.
        why_cached: why the stage need not run; None if it must.
        slot: the device to compute on.
    """
    if why_cached is not None:
        return cached(why_cached)
    try:
        before = run.dvc.snapshot(stage, clip)
        import_libraries()
        started = time.monotonic()
        stages = run.stages(clip)
        stages.run(stage, slot)
        if stage == "score":
            stages.report()
        run.dvc.commit(stage, clip, before)
    except (TavError, FullDiskError) as error:
        return Failed(message=str(error))
    except Stopped:
        return interrupted()
    result = f": {headlines_text(_mean_scores(run, clip))}" if stage == "score" else ""
    return Completed(message=f"{stage} of {clip} done in {clock(time.monotonic() - started)}{result}")


def _mean_scores(run: PipelineRun, clip: str) -> dict[str, float]:
    scores: dict[str, float] = read_json(run.stages(clip).project.scores(clip) / "metrics.json")["mean"]
    return scores
