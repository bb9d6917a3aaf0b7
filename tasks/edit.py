"""Edit: one video for each row of a prompt CSV, from the clip's inverted latents."""

from __future__ import annotations

from tasks.rows import RowBatch, render_rows
from tav.runtime.events import EventStream
from tav.runtime.progress import Progress


def edit(batch: RowBatch, events: EventStream, clip: str = "") -> None:
    """Render the rows that are not done, and leave the results folder.

    Raises:
        TavError: rows have failed, after the others are done.
        FullDiskError: the disk is full, at once.
    """
    todo = batch.todo()
    with edit_progress(batch, events, clip) as progress:
        results = list(render_rows(batch, todo, events, clip, progress))
    batch.publish({result.row.name: result.error for result in results if result.error is not None})


def edit_progress(batch: RowBatch, events: EventStream, clip: str) -> Progress:
    """Return the progress of all rows that are not done yet, in sampling steps."""
    return Progress(
        events, stage="edit", clip=clip, total=sum({row.identity: batch.steps_of(row) for row in batch.todo()}.values())
    )
