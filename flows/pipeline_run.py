"""What all task runs of one flow run share: the project, the devices, the stream of events, and DVC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed

from tasks.all_stages import why_not_run
from tasks.clip_stages import ClipStages
from tav.runtime.devices import DevicePool, is_out_of_memory
from tav.runtime.events import EventStream
from tav.versioning.dvc_pipeline import DvcPipeline

if TYPE_CHECKING:
    from prefect import Task
    from prefect.client.schemas.objects import TaskRun

INTERRUPTED = "interrupted; the next run resumes where this one stopped"
DISK_FULL = "DiskFull"  # the name of the state of a row that was not rendered for that reason


def is_transient(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Return whether a retry may help: after trouble with files or memory, not after a user's mistake.

    The stages themselves retry with smaller batches when memory runs out; a retry of the task run is for memory that
    another process has freed by then.
    """
    return isinstance(state.data, OSError) or (isinstance(state.data, Exception) and is_out_of_memory(state.data))


RETRIES: dict[str, Any] = {
    "retries": 2,
    "retry_delay_seconds": [2, 10],
    "retry_condition_fn": is_transient,
    "cache_policy": NO_CACHE,  # DVC is the cache.
}


def cached(message: str) -> State[None]:
    """Return the state of a task run whose work was done before."""
    return Completed(name="Cached", message=message)


def interrupted() -> State[None]:
    """Return the state of a run that the user, or whoever runs it, has stopped."""
    return Cancelled(message=INTERRUPTED)


class PipelineRun:
    """One run of the flow over some clips.

    Args:
        clips: the clips, in order of priority.
        pool: the devices that heavy stages hold one at a time.
        tags: further tags of the MLflow runs.
    """

    def __init__(
        self,
        root: Path,
        clips: Sequence[str],
        events: EventStream,
        pool: DevicePool,
        tags: Mapping[str, str],
    ) -> None:
        self.root, self.clips, self.events, self.pool, self.tags = root, list(clips), events, pool, tags
        self.dvc = DvcPipeline(root)

    def stages(self, clip: str) -> ClipStages:
        """Return the stages of a clip, by the params.yaml that is there now."""
        return ClipStages(self.root, clip, self.events, self.pool, self.clips.index(clip), self.tags)

    def restore_if_possible(self, stage: str, clip: str) -> str | None:
        """Return why a stage need not run, after restoring its outputs if DVC's cache has them; None if it must run.

        Raises:
            TavError: DVC cannot read the project, or an input is missing.
        """
        return why_not_run(self.dvc, self.events, stage, clip)
