"""The stage `edit` in the flow: a task run for each row of the prompt CSV, as many at once as there are devices."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from prefect import task
from prefect.client.schemas.objects import State
from prefect.runtime import task_run
from prefect.states import Completed, Failed

from flows.pipeline_run import NO_ROOM, RETRIES, PipelineRun, cached
from tasks.edit import edit_progress
from tasks.model_loading import import_libraries
from tasks.rows import RowBatch, RowResult, render_rows
from tav.config.prompts import EditRow
from tav.runtime.events import RowFinished
from tav.runtime.logs import logging_to
from tav.runtime.progress import Progress
from tav_model.errors import FullDiskError, TavError


def _row_name() -> str:
    return f"edit: {task_run.parameters['row'].prompt}"


class EditRows:
    """The rows of one clip, shared by the task runs that render them.

    Attributes:
        rows: every row of the prompt CSV, once opened.
        batch: the rows with their store, once opened, unless they are up to date.
    """

    def __init__(self, run: PipelineRun, clip: str) -> None:
        self.run, self.clip, self.stages = run, clip, run.stages(clip)
        self.rows: list[EditRow] = []
        self.batch: RowBatch
        self._progress: Progress
        self._why_cached: str | None = None
        self._found: set[str] = set()
        self._mutex = threading.Lock()
        self._claimed: dict[str, threading.Event] = {}
        self._results: dict[str, RowResult] = {}

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Let rows be rendered within the `with` block; at its end leave the results folder and commit it to DVC.

        Raises:
            TavError: another process works on the clip, an input has changed meanwhile, or rows have failed.
            FullDiskError: the disk is full.
        """
        self._why_cached = self.run.why_cached("edit", self.clip)
        if self._why_cached is not None:
            self.rows = self.stages.edit_rows()
            yield
            return
        before = self.run.dvc.snapshot("edit", self.clip)
        import_libraries()
        with self.stages.prepared("edit", "edit"), self.stages.reported("edit"):
            batch = self.batch = self.stages.edit_batch(self.run.pool.devices[0])
            self.rows = batch.rows
            self._found = {row.identity for row in batch.rows if batch.is_done(row)}
            with edit_progress(batch, self.run.events, self.clip) as self._progress:
                try:
                    yield
                finally:
                    self.run.pool.drop(self._resident)
            batch.publish({one.row.name: one.error for one in self._results.values() if one.error is not None})
        self.run.dvc.commit("edit", self.clip, before)

    @property
    def _resident(self) -> str:
        return f"edit {self.clip}"

    def why_cached(self, row: EditRow) -> str | None:
        """Return why a row is not rendered now; None where it is to be rendered."""
        return self._why_cached or ("rendered before" if row.identity in self._found else None)

    def render(self, row: EditRow) -> RowResult:
        """Render a row, together with others that wait where `runtime.edit_batch` asks for it.

        Raises:
            TavError: the model cannot be loaded.
            FullDiskError: the disk is full.
        """
        with self._mutex:
            finished = self._claimed.get(row.identity)
        if finished is not None:
            finished.wait()
            if row.identity in self._results:
                return self._results[row.identity]
        log = self.stages.project.log(self.clip, "edit")
        with logging_to(log), self.run.pool.hold(self.stages.priority, prefer=self._resident) as slot:
            self.run.events.check()
            batch: RowBatch | None = slot.resident.get(self._resident)
            if batch is None:
                batch = slot.resident[self._resident] = self.stages.edit_batch(slot.device)
            group = self._claim(row, batch)
            try:
                for result in render_rows(batch, group, self.run.events, self.clip, self._progress):
                    self._results[result.row.identity] = result
            finally:
                with self._mutex:
                    for one in group:
                        finished = self._claimed.pop(one.identity)
                        finished.set()
        return self._results[row.identity]

    def adopt(self, result: RowResult) -> None:
        """Count a row that was rendered elsewhere, its files in the store of `batch`."""
        row = result.row
        self._results[row.identity] = result
        if result.error is None:
            self._progress.update(row.steps)
            self.run.events.publish(RowFinished(clip=self.clip, stage="edit", row=row.name, edit=row))

    def _claim(self, row: EditRow, batch: RowBatch) -> list[EditRow]:
        """Take the row, and rows that can be sampled with it and no other task run has taken."""
        with self._mutex:
            taken = self._found | self._results.keys() | self._claimed.keys()
            group = batch.first_group(
                [row, *(one for one in self.rows if one is not row and one.identity not in taken)]
            )
            self._claimed |= {one.identity: threading.Event() for one in group}
        return group


@task(name="edit row", task_run_name=_row_name, **RETRIES)
def render_row(edits: EditRows, row: EditRow, tuned: Any, inverted: Any) -> State[None]:
    """Render one row of the prompt CSV into the store of rendered rows.

    Args:
        edits: the rows of the clip.
        row: the row to render.
        tuned: the task run of the stage `tune`, which this one depends on.
        inverted: the task run of the stage `invert`, which this one depends on.
    """
    why = edits.why_cached(row)
    if why is not None:
        return cached(why)
    try:
        result = edits.render(row)
    except TavError as error:
        return Failed(message=str(error))
    except FullDiskError as error:
        return Failed(name=NO_ROOM, message=str(error))
    if result.error is not None:
        return Failed(message=result.error)
    return Completed(message=f"{row.name}: {row.prompt}")
