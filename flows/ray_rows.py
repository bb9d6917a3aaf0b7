"""Work on a Ray cluster (`runtime.ray` in params.yaml; the extra `tav[ray]`).

That is the rows of a clip, a Prefect task run each, whose inputs travel by the DVC remote; and the clips of a benchmark.
"""

from __future__ import annotations

import importlib.util
import logging
import platform
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from prefect import task
from prefect.client.schemas.objects import State, TaskRunResult
from prefect.futures import PrefectConcurrentFuture, PrefectFuture
from prefect.states import Completed, Failed

from flows.artifacts import ProgressArtifacts
from flows.edit_rows import EditRows, run_row
from flows.pipeline_run import DISK_FULL, RETRIES
from tasks import row_jobs
from tasks.clip_stages import ClipStages
from tasks.row_jobs import RowJob
from tasks.rows import RowBatch, RowResult
from tav.config import RuntimeParams
from tav.config.prompts import EditRow
from tav.runtime.events import EventStream
from tav.versioning.dvc_pipeline import DvcPipeline
from tav_model.errors import FullDiskError, TavError, first_line

Result = TypeVar("Result")
RAY_NAMES = {"num_cpus": "CPU", "num_gpus": "GPU"}


def render_rows_on_ray(
    edits: EditRows, tuned: PrefectFuture[Any], inverted: PrefectFuture[Any]
) -> list[PrefectFuture[Any]]:
    """Render a clip's rows on the cluster, and put what comes back into the clip's store.

    The inputs are pushed to the DVC remote first, if there is one, and each worker pulls what it lacks.

    Args:
        edits: the rows, opened.
        tuned: the task run of the stage `tune`, which every row depends on.
        inverted: the task run of the stage `invert`, which every row depends on.

    Returns:
        The task runs of the rows.

    Raises:
        TavError: prefect-ray is not installed, the cluster or the remote cannot be reached, or a worker's disk is full.
    """
    done = [row for row in edits.rows if edits.why_cached(row) is not None]
    todo = [row for row in edits.rows if row not in done]
    futures: list[PrefectFuture[Any]] = [run_row(edits, row, tuned, inverted) for row in done]
    if not todo:
        return futures
    _check_installed()
    from prefect_ray import RayTaskRunner
    from prefect_ray.context import remote_options

    stages = edits.stages
    address, share = stages.params.runtime.ray, stages.params.runtime.ray_gpus
    jobs = _jobs(stages, todo, share)
    resources = _resources(edits.run.pool.devices[0], share)
    # Prefect stores dependencies by parameter, and the futures themselves cannot go to another machine.
    upstream: dict[str, set[Any]] = {"job": {TaskRunResult(id=future.task_run_id) for future in (tuned, inverted)}}
    try:
        with RayTaskRunner(address=None if address == "local" else address) as runner, remote_options(**resources):
            _check_room(resources)
            submitted = []
            for row, job in zip(todo, jobs, strict=True):
                task_run = _render_job.with_options(task_run_name=f"edit: {_literal(row.prompt)}", **RETRIES)
                submitted.append(runner.submit(task_run, {"job": job}, dependencies=upstream))
            for row, future in zip(todo, submitted, strict=True):
                result = _result(row, future, edits.batch)
                edits.register_remote(result)
                futures.append(_finished(future, result))
    except ConnectionError as error:
        raise _no_cluster(address, error) from None
    return futures


def _finished(future: PrefectFuture[Any], result: RowResult) -> PrefectFuture[Any]:
    """Return the future of a task run on the cluster in a form that outlasts the connection to it."""
    finished: Future[State[None]] = Future()
    finished.set_result(
        Completed(message=result.row.name, data=True) if result.error is None else Failed(message=result.error)
    )
    return PrefectConcurrentFuture(task_run_id=future.task_run_id, wrapped_future=finished)


def _result(row: EditRow, future: PrefectFuture[Any], batch: RowBatch) -> RowResult:
    try:
        row_jobs.adopt(batch, row, future.result())
    except FullDiskError:
        raise
    except Exception as error:
        if future.state.name == DISK_FULL:
            raise TavError(future.state.message) from None
        return RowResult(row, error=first_line(getattr(error, "cause", None) or error))  # Ray wraps a worker's error.
    return RowResult(row, rendered=True)


def run_clips(
    run_clip: Callable[[Path, str, bool], Result],
    project: Path,
    clips: Sequence[str],
    runtime: RuntimeParams,
    device: str,
) -> Iterator[tuple[str, Result | Exception]]:
    """Run clips on the cluster, whose machines share the project's folder; yield each clip's result as it arrives.

    Args:
        run_clip: called with the project, the clip, and whether it has the GPU for itself.
        project: the folder of the project.
        clips: the clips to run.
        runtime: the section `runtime` of params.yaml.
        device: the driver's device, assumed for the workers too.

    Raises:
        TavError: Ray is not installed, or the cluster cannot be reached or has no room.
    """
    _check_installed()
    import ray
    import torch

    address, threads = runtime.ray, torch.get_num_threads()
    try:
        ray.init(None if address == "local" else address, ignore_reinit_error=True, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise _no_cluster(address, error) from None
    try:
        resources = _resources(device, runtime.ray_gpus)
        _check_room(resources)
        work: Any = ray.remote(_work).options(**resources)
        alone = runtime.ray_gpus >= 1
        pending = {work.remote(run_clip, str(project.resolve()), clip, threads, alone): clip for clip in clips}
        while pending:
            (ready,), _ = ray.wait(list(pending))
            clip = pending.pop(ready)
            try:
                result = ray.get(ready)
            except ray.exceptions.RayError as error:
                result = getattr(error, "cause", None) or error
            yield clip, result
    finally:
        ray.shutdown()


def _work(run_clip: Callable[[Path, str, bool], Result], project: str, clip: str, threads: int, alone: bool) -> Result:
    import torch

    torch.set_num_threads(threads)
    if not Path(project).is_dir():
        raise TavError(f"the worker {platform.node()} has no folder {project}: the machines must share it")
    return run_clip(Path(project), clip, alone)


def _check_installed() -> None:
    if importlib.util.find_spec("prefect_ray") is None:
        raise TavError("params.yaml: runtime.ray: Ray is not installed: pip install 'tav[ray]'")


def _resources(device: str, share: float) -> dict[str, float]:
    """Return what a task requests: on a CPU as many threads as the driver has, for bit-identical results."""
    import torch

    return {"num_cpus": 1, "num_gpus": share} if device.startswith("cuda") else {"num_cpus": torch.get_num_threads()}


def _no_cluster(address: str | None, error: Exception) -> TavError:
    return TavError(f"params.yaml: runtime.ray: no Ray cluster answers at {address} ({first_line(error)})")


@task(name="edit row")
def _render_job(job: RowJob) -> State[Any] | dict[str, bytes]:
    try:
        return row_jobs.render(job, EventStream(ProgressArtifacts()))
    except TavError as error:
        return Failed(message=str(error))
    except FullDiskError as error:
        return Failed(name=DISK_FULL, message=str(error))


def _jobs(stages: ClipStages, todo: Sequence[EditRow], share: float) -> list[RowJob]:
    dvc = DvcPipeline(stages.root)
    paths = row_jobs.inputs_of(stages.project, stages.clip)
    reached = [dvc.publish(stage, stages.clip, paths) for stage in ("annotate", "tune", "invert")][-1]
    return [row_jobs.describe(stages, row, reached, share) for row in todo]


def _check_room(resources: dict[str, float]) -> None:
    """Check that a machine of the cluster is large enough; Ray would wait for ever.

    Raises:
        TavError: no machine of the cluster has these resources.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(all(node.get(RAY_NAMES[name], 0) >= amount for name, amount in resources.items()) for node in nodes):
        return
    wanted = ", ".join(f"{RAY_NAMES[name]} {amount:g}" for name, amount in resources.items())
    most = ", ".join(f"{name} {max(node.get(name, 0) for node in nodes):g}" for name in RAY_NAMES.values())
    raise TavError(
        f"runtime.ray: a row requests {wanted}, but no machine of the cluster has that (the most: {most}); "
        "OMP_NUM_THREADS sets the threads of a row on a CPU, runtime.ray_gpus its share of a GPU"
    )


def _literal(text: str) -> str:
    """Escape a text where Prefect expects a template."""
    return text.replace("{", "{{").replace("}", "}}")
