"""Work on a Ray cluster (`runtime.ray` in params.yaml; the extra `tav[ray]`).

The rows of a batch, a Prefect task run each, whose inputs go by the DVC remote; and the clips of a benchmark.
"""

from __future__ import annotations

import importlib.util
import logging
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from prefect import task
from prefect.states import Failed, State

from flows.artifacts import ProgressArtifact
from tasks import row_jobs as remote
from tasks.clip_stages import ClipStages
from tasks.row_jobs import RowJob
from tasks.rows import RowBatch
from tav.config import RuntimeParams
from tav.config.prompts import EditRow
from tav.runtime.progress import Progress
from tav.versioning.dvc_pipeline import DvcPipeline
from tav_model.errors import TavError, first_line

Result = TypeVar("Result")
RAY_NAMES = {"num_cpus": "CPU", "num_gpus": "GPU"}


def render_rows(
    stages: ClipStages, batch: RowBatch, todo: list[EditRow], progress: Progress, settings: dict[str, Any]
) -> dict[str, str]:
    """Render `todo` on the cluster, and put what comes back into the store of `batch`.

    The inputs go to the DVC remote first, if there is one, and each worker pulls what it lacks.

    Args:
        settings: of each row's task: its retries.

    Returns:
        The rows that failed, by name, with the reason.

    Raises:
        TavError: prefect-ray is not installed, or the cluster or the remote cannot be reached.
    """
    _check_installed()
    from prefect_ray import RayTaskRunner
    from prefect_ray.context import remote_options

    address, share = stages.params.runtime.ray, stages.params.runtime.ray_gpus
    jobs = _jobs(stages, todo, share)
    resources = _resources(batch.device, share)

    failed = {}
    try:
        with RayTaskRunner(address=None if address == "local" else address) as runner, remote_options(**resources):
            _check_room(resources)
            futures = []
            for edit, job in zip(todo, jobs, strict=True):
                row = _row.with_options(task_run_name=f"edit: {_literal(edit.prompt)}", **settings)
                futures.append(runner.submit(row, {"job": job, "name": edit.name}))
            for edit, future in zip(todo, futures, strict=True):
                try:
                    remote.adopt(batch, edit, future.result())
                except Exception as error:
                    failed[edit.name] = first_line(
                        getattr(error, "cause", None) or error
                    )  # Ray wraps a worker's error.
                    continue
                progress.update(edit.steps)
                stages.runs.edit(edit)
    except ConnectionError as error:
        raise _no_cluster(address, error) from None
    return failed


def run_clips(
    run_clip: Callable[[Path, str, bool], Result],
    project: Path,
    clips: Sequence[str],
    runtime: RuntimeParams,
    device: str,
) -> Iterator[tuple[str, Result | Exception]]:
    """Clips on the cluster, whose machines share the project's folder: each clip's result when it is there.

    Args:
        run_clip: given the project, the clip and whether it has the GPU for itself.
        device: of the driver, taken for the workers' too.

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
    """What a task asks for: on a CPU the threads of the driver, for the same bits."""
    import torch

    return {"num_cpus": 1, "num_gpus": share} if device.startswith("cuda") else {"num_cpus": torch.get_num_threads()}


def _no_cluster(address: str | None, error: Exception) -> TavError:
    return TavError(f"params.yaml: runtime.ray: no Ray cluster answers at {address} ({first_line(error)})")


@task(name="edit row")
def _row(job: RowJob, name: str) -> State | dict[str, bytes]:
    shown, done = ProgressArtifact(f"{job.clip} {name}"), 0

    def on_step(steps: int) -> None:
        nonlocal done
        done += steps
        shown(done, job.steps, {})

    try:
        return remote.render(job, on_step)
    except TavError as error:
        return Failed(message=str(error))


def _jobs(stages: ClipStages, todo: list[EditRow], share: float) -> list[RowJob]:
    versions = DvcPipeline(stages.root)
    paths = remote.inputs_of(stages.project, stages.clip)
    reached = [versions.publish(stage, stages.clip, paths) for stage in ("tune", "invert")][-1]
    return [remote.describe(stages, edit, reached, share) for edit in todo]


def _check_room(resources: dict[str, float]) -> None:
    """Ray would wait for ever for a machine that the cluster does not have.

    Raises:
        TavError: no machine of the cluster has as much.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(all(node.get(RAY_NAMES[name], 0) >= amount for name, amount in resources.items()) for node in nodes):
        return
    wanted = ", ".join(f"{RAY_NAMES[name]} {amount:g}" for name, amount in resources.items())
    most = ", ".join(f"{name} {max(node.get(name, 0) for node in nodes):g}" for name in RAY_NAMES.values())
    raise TavError(
        f"runtime.ray: a row asks for {wanted}, but no machine of the cluster has that (the most: {most}); "
        "OMP_NUM_THREADS sets the threads of a row on a CPU, runtime.ray_gpus its share of a GPU"
    )


def _literal(text: str) -> str:
    """Prefect takes a name for a template."""
    return text.replace("{", "{{").replace("}", "}}")
