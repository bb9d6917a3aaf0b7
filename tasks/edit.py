"""Edit: one video for each row of a prompt CSV, from the clip's inverted latents."""

from __future__ import annotations

import logging
from collections.abc import Callable

from tasks.rows import RowBatch
from tav.config.prompts import EditRow
from tav.runtime.progress import Progress
from tav_model.errors import FullDiskError, first_line

logger = logging.getLogger(__name__)


def edit(batch: RowBatch, progress: Progress, on_done: Callable[[EditRow], None] | None = None) -> None:
    """Render what is to do, one row after the other, and leave the results folder.

    Args:
        on_done: told each edit that was rendered now.

    Raises:
        TavError: rows that failed, after the others are done.
        FullDiskError: at once.
    """
    todo = batch.todo()
    if todo:
        batch.pipeline  # noqa: B018 (a model that cannot be loaded is no fault of a row)
    failed = {}
    with progress:
        for row in todo:
            try:
                batch.render(row, on_step=progress.update)
            except FullDiskError:
                raise  # No fault of a row; those that are done are found by the next run.
            except Exception as error:
                logger.exception("row %s failed", row.name)
                failed[row.name] = first_line(error)
            else:
                if on_done is not None:
                    on_done(row)
    batch.finish(failed)
