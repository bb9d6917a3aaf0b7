"""DVC in this process: which stages are up to date, what its cache can restore, and the record of a stage that has run.

A stage of a clip is `STAGE@CLIP` in dvc.yaml. dvc.lock, the cache and the run cache are written exactly as `dvc repro`
writes them, so that either resumes where the other has stopped.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tav.config.rewriting import complete_keys
from tav.versioning import dvc_internals as dvc
from tav.versioning.dvc_internals import DvcError, DvcLockedError, DvcStageStatus, Inputs
from tav_model.disk_space import explained_full_disk
from tav_model.errors import TavError

if TYPE_CHECKING:
    from dvc.dvcfile import ProjectFile
    from dvc.stage import PipelineStage

__all__ = ["DvcPipeline", "DvcStageStatus", "Inputs"]

Result = TypeVar("Result")

RETRY_SECONDS = 0.5

logger = logging.getLogger(__name__)

# DVC's locks are between processes; threads of this one take turns.
_one_at_a_time = threading.Lock()


class DvcPipeline:
    """The DVC project in `root`, which must be the current folder, because DVC looks for dvc.yaml there.

    Every method reads the files as they are now, and may be called from any thread.

    Args:
        root: the project's folder, with `.dvc` in it.
        wait: seconds to wait for another process that uses DVC here.

    Raises:
        TavError: From every method: no such stage or clip, files that DVC cannot read, a missing input, or another
            process that holds DVC's locks for longer than `wait`.
        FullDiskError: From every method: DVC runs out of disk space.
    """

    def __init__(self, root: Path, wait: float = 60) -> None:
        self.root, self.wait = root.resolve(), wait
        self._added: list[str] = []
        self._is_prepared = False
        self._project_file = dvc.ProjectFileCache(self.root)

    def is_current(self, stage: str, clip: str) -> bool:
        """Return whether `dvc repro` would skip the stage: command, inputs and outputs are those of dvc.lock."""
        return self._with_stage(stage, clip, dvc.is_current)

    def status(self, clip: str, stages: Sequence[str]) -> dict[str, DvcStageStatus]:
        """Return the status of each stage for the inputs as they are now. Nothing is changed."""

        def read(stage: PipelineStage) -> DvcStageStatus:
            try:
                with dvc.own_errors():
                    return dvc.status(stage)
            except DvcLockedError as error:
                return DvcStageStatus("in use", [dvc.lock_holder(self.root, error)])

        return self._with_project(
            f"{stages[0]}@{clip}", lambda project: {stage: read(project.stages[f"{stage}@{clip}"]) for stage in stages}
        )

    def restore(self, stage: str, clip: str) -> bool:
        """Restore from DVC's cache what the stage produced for the inputs as they are now, if the cache has it.

        That is the record in dvc.lock if only outputs are missing or changed, otherwise that of the run cache. Files in
        the places of outputs are replaced.

        Returns:
            True: the stage is up to date now, and dvc.lock says so. False: nothing was changed.
        """

        def restore(loaded: PipelineStage) -> bool:
            is_restored = dvc.restore(loaded)
            if is_restored:
                dvc.record(loaded, self._added)
            return is_restored

        return self._with_stage(stage, clip, restore)

    def snapshot(self, stage: str, clip: str) -> Inputs:
        """Return the stage's inputs as they are now, to be taken before it runs and passed to `commit` afterwards."""
        return self._with_stage(stage, clip, dvc.read_inputs)

    def commit(self, stage: str, clip: str, before: Inputs) -> None:
        """Record what the stage has just produced: its outputs in the cache, its inputs and outputs in dvc.lock.

        Args:
            stage: the stage's name.
            clip: the clip's name.
            before: what `snapshot` returned before the stage ran.

        Raises:
            TavError: The inputs have changed since, or an output is missing; dvc.lock is left unchanged.
        """

        def commit(loaded: PipelineStage) -> None:
            dvc.save(loaded, before)
            dvc.record(loaded, self._added)

        self._with_stage(stage, clip, commit)

    def publish(self, stage: str, clip: str, paths: Sequence[str]) -> dict[str, str] | None:
        """Push outputs of the stage to the default DVC remote, as far as it lacks them.

        Args:
            stage: the stage's name.
            clip: the clip's name.
            paths: outputs, as dvc.yaml names them.

        Returns:
            What another machine needs to reach the remote, without credentials, which it has itself. None: the project
            has no default remote.

        Raises:
            TavError: The remote cannot be reached, or the cache lacks an output.
        """
        return self._with_stage(stage, clip, lambda loaded: dvc.push(loaded, paths))

    def _with_stage(self, stage: str, clip: str, action: Callable[[PipelineStage], Result]) -> Result:
        """Return the result of `action` on the stage, under DVC's locks."""
        name = f"{stage}@{clip}"
        return self._with_project(name, lambda project: action(project.stages[name]))

    def _with_project(self, name: str, action: Callable[[ProjectFile], Result]) -> Result:
        """Return the result of `action` on dvc.yaml, under DVC's locks; `name` is for messages."""
        end = time.monotonic() + self.wait
        is_reported = False
        while True:
            try:
                with explained_full_disk(self.root / ".dvc"), self._loaded() as project:
                    return action(project)
            except DvcLockedError as error:
                holder = dvc.lock_holder(self.root, error)
                if time.monotonic() >= end:
                    raise TavError(f"{name}: DVC is in use here by {holder}; wait for it to end") from None
                if not is_reported:
                    logger.info("%s: waiting for %s, which uses DVC here", name, holder)
                    is_reported = True
                time.sleep(RETRY_SECONDS)
            except DvcError as error:
                raise TavError(f"{name}: {error}") from error

    @contextlib.contextmanager
    def _loaded(self) -> Iterator[ProjectFile]:
        if Path.cwd() != self.root:
            raise TavError(f"{self.root}: the project must be the current folder, which is {Path.cwd()}")
        if not (self.root / ".dvc").is_dir():
            raise TavError(f"{self.root}: not a DVC project: no folder .dvc")
        with _one_at_a_time, dvc.locked_repo(self.root) as repo:
            dvc.repair(repo)
            if not self._is_prepared:
                dvc.clear_cache(repo)
                complete_keys(self.root / "params.yaml")
                dvc.complete_records(self._project_file.load(repo))
                self._is_prepared = True
            yield self._project_file.load(repo)
