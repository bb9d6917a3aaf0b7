"""The stage `edit` in the flow: a task run for each row of the prompt CSV, as many at once as there are devices."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

from prefect import task
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.runtime import task_run
from prefect.states import Completed, Failed

from flows.pipeline_run import DISK_FULL, RETRIES, PipelineRun, cached, interrupted
from tasks.clip_stages import ClipStages
from tasks.edit import edit_progress
from tasks.model_loading import import_libraries
from tasks.rows import RowBatch, RowResult, render_rows
from tav.config.prompts import EditRow
from tav.runtime.devices import Slot
from tav.runtime.events import RowFinished, Stopped
from tav.runtime.logs import logging_to
from tav.runtime.progress import Progress
from tav_model.errors import FullDiskError, TavError


def _row_name() -> str:
    return f"edit: {task_run.parameters['row'].prompt}"


class EditRows:
    """The rows of one clip, shared by the task runs that render them.

    Attributes:
        stages: the stages of the clip, once in the session.
        rows: every row of the prompt CSV, once in the session.
        batch: the rows with their store, once in the session, unless they are up to date.
    """

    def __init__(self, run: PipelineRun, clip: str) -> None:
        self.run, self.clip = run, clip
        self.stages: ClipStages
        self.rows: list[EditRow] = []
        self.batch: RowBatch
        self._progress: Progress
        self._why_cached: str | None = None
        self._found: set[str] = set()
        self._mutex = threading.Lock()
        self._finished: dict[str, threading.Event] = {}
        self._results: dict[str, RowResult] = {}

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Prepare the rendering of rows; on exit, write the results folder and commit it to DVC.

        Raises:
            TavError: another process works on the clip, an input has changed meanwhile, or rows have failed.
            FullDiskError: the disk is full.
        """
        self._why_cached = self.run.restore_if_possible("edit", self.clip)
        if self._why_cached is not None:
            self.stages = self.run.stages(self.clip)
            self.rows = self.stages.edit_rows()
            yield
            return
        before = self.run.dvc.snapshot("edit", self.clip)
        self.stages = self.run.stages(self.clip)  # By the parameters of the snapshot, or the commit is refused.
        import_libraries()
        with self.stages.prepared("edit", "edit"), self.stages.reported("edit"):
            batch = self.batch = self.stages.edit_batch(self.run.pool.devices[0])
            self.rows = batch.rows
            self._found = {row.identity for row in batch.rows if batch.is_done(row)}
            with edit_progress(batch, self.run.events, self.clip) as self._progress:
                try:
                    yield
                finally:
                    self.run.pool.drop(self.resident)
            batch.publish(self._errors())
        self.run.dvc.commit("edit", self.clip, before)

    @property
    def resident(self) -> str:
        """The name under which a device keeps the clip's model from row to row."""
        return f"edit {self.clip}"

    def why_cached(self, row: EditRow) -> str | None:
        """Return why a row is not rendered now; None if it is to be rendered."""
        return self._why_cached or ("rendered before" if row.identity in self._found else None)

    def claim(self, row: EditRow) -> list[EditRow]:
        """Return the rows that the task run of `row` is to render: itself, and others that can be sampled with it.

        Rows that another task run has claimed are left out; the list is empty if `row` itself is one of them, or is
        cached.
        """
        if self.why_cached(row):
            return []
        with self._mutex:
            if row.identity in self._finished:
                return []
            taken = self._found | self._finished.keys() | {row.identity}
            free = {other.identity: other for other in self.rows if other.identity not in taken}
            group = self.batch.first_group([row, *free.values()])
            self._finished |= {member.identity: threading.Event() for member in group}
        return group

    def release(self, group: Sequence[EditRow], error: str) -> None:
        """Wake the task runs that wait for these rows; `error` becomes the result of those that have none."""
        for row in group:
            self._results.setdefault(row.identity, RowResult(row, error=error))
            self._finished[row.identity].set()

    def render(self, group: Sequence[EditRow], slot: Slot) -> None:
        """Render rows together on a device.

        Raises:
            TavError: the model cannot be loaded.
            FullDiskError: the disk is full.
        """
        with logging_to(self.stages.project.log(self.clip, "edit")):
            batch: RowBatch | None = slot.resident.get(self.resident)
            if batch is None:
                batch = slot.resident[self.resident] = self.stages.edit_batch(slot.device)
            for result in render_rows(batch, group, self.run.events, self.clip, self._progress):
                self._results[result.row.identity] = result

    def result(self, row: EditRow) -> RowResult:
        """Return the result of a row, waiting for the task run that has claimed it."""
        if row.identity not in self._results:
            self._finished[row.identity].wait()
        return self._results[row.identity]

    def register_remote(self, result: RowResult) -> None:
        """Register a row that was rendered elsewhere, its files in the store of `batch`."""
        row = result.row
        self._results[row.identity] = result
        if result.error is None:
            self._progress.update(self.batch.steps_of(row))
            self.run.events.publish(RowFinished(clip=self.clip, stage="edit", row=row.name, edit=row))

    def _errors(self) -> dict[str, str]:
        """Return why rows have failed, by name."""
        results = {row.name: self._results.get(row.identity) for row in self.rows if row.identity not in self._found}
        return {
            name: result.error for name, result in results.items() if result is not None and result.error is not None
        }


def run_row(
    edits: EditRows, row: EditRow, tuned: PrefectFuture[Any], inverted: PrefectFuture[Any]
) -> PrefectFuture[Any]:
    """Run the task of one row, once a device is free if it needs one; return its finished future.

    Raises:
        TavError: the disk is full, which is no fault of a row; rows that are done stay done.
        Stopped: it was interrupted.
    """
    run = edits.run
    group = edits.claim(row)
    device = run.pool.hold(edits.stages.priority, edits.resident, run.events.check) if group else nullcontext()
    error = "not rendered"
    try:
        with device as slot:
            run.events.check()
            future = render_row.submit(edits, row, tuned, inverted, group, slot)
            future.wait()
        error = future.state.message or error
    finally:
        edits.release(group, error)
    if future.state.is_cancelled():
        raise Stopped
    if future.state.name == DISK_FULL:
        raise TavError(error)
    return future


@task(name="edit row", task_run_name=_row_name, **RETRIES)
def render_row(
    edits: EditRows, row: EditRow, tuned: Any, inverted: Any, group: list[EditRow], slot: Slot | None
) -> State[None]:
    """Render one row of the prompt CSV into the store of rendered rows.

    Args:
        edits: the rows of the clip.
        row: the row.
        tuned: the task run of the stage `tune`, which this one depends on.
        inverted: the task run of the stage `invert`, which this one depends on.
        group: the rows to render, this one included; empty if it was rendered before, or is rendered with another.
        slot: the device to render on.
    """
    why = edits.why_cached(row)
    if why is not None:
        return cached(why)
    try:
        if slot is not None:
            edits.render(group, slot)
        result = edits.result(row)
        if result.error is not None:
            edits.run.events.check()  # The task run that was to render it has been interrupted.
    except TavError as error:
        return Failed(message=str(error))
    except FullDiskError as error:
        return Failed(name=DISK_FULL, message=str(error))
    except Stopped:
        return interrupted()
    if result.error is not None:
        return Failed(message=result.error)
    return Completed(message=f"{row.name}: {row.prompt}")
