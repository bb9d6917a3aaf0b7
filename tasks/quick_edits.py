"""Edits at once: prompts rendered from what a clip's tuning and inversion have left, beside the pipeline.

They go to `results/CLIP/quick/`, which DVC does not watch. What was rendered before, here or by the stage `edit`, with the
same prompt, settings and inputs, is found and not rendered again.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.clip_stages import ClipStages
from tasks.rows import RowBatch
from tav.config.prompts import EditRow, PromptRow
from tav.config.results import EDIT_SUFFIXES, read_record
from tav_model.digests import digest
from tav_model.errors import TavError, first_line
from tav_model.files import atomic_file, write_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuickEditResult:
    """One prompt's video, or why there is none.

    Attributes:
        rendered: False: it was found.
        error: None where there is a video.
    """

    prompt: str
    video: Path | None
    rendered: bool = False
    error: str | None = None


def quick_edits(stages: ClipStages, rows: Sequence[PromptRow]) -> Iterator[QuickEditResult]:
    """Each row's edit, when it is there; one that fails, fails alone.

    Raises:
        TavError: the clip is not tuned and inverted, or another process works on it.
    """
    check_ready(stages)
    with stages.quick_session():
        batch = stages.quick_batch(rows)
        todo = batch.todo()
        done = [edit for edit in batch.edits if edit not in todo]
        for edit in done:
            yield QuickEditResult(edit.prompt, _publish(batch, edit))
        if not todo:
            return
        batch.pipeline  # noqa: B018 (a model that cannot be loaded is no fault of a prompt)
        with stages.quick_progress(todo) as progress:
            for edit in todo:
                try:
                    batch.render(edit, on_step=progress.update)
                    video = _publish(batch, edit)
                except Exception as error:
                    logger.info("%r failed", edit.prompt, exc_info=True)  # The caller says it on the terminal.
                    yield QuickEditResult(edit.prompt, None, error=first_line(error))
                else:
                    yield QuickEditResult(edit.prompt, video, rendered=True)


def check_ready(stages: ClipStages) -> None:
    """Raises TavError where the clip has not come as far as to be edited."""
    tuned, inverted = stages.project.tuned(stages.clip), stages.project.inverted(stages.clip)
    needed = (tuned / "tuned.json", tuned / "tuned.safetensors", inverted / "inverted.safetensors")
    if not all(path.is_file() for path in needed):
        raise TavError(f"{stages.clip}: not tuned and inverted yet; tav run {stages.clip} does it")


def _publish(batch: RowBatch, edit: EditRow) -> Path:
    """Put a rendered edit under its name into the results, unless it lies there; returns the video's path."""
    name = _name(batch.out, edit)
    video = batch.out / f"{name}.mp4"
    if _is_whole(video, edit.identity):
        return video
    source = batch.store / edit.identity
    for suffix in EDIT_SUFFIXES:
        if suffix != ".json":
            with atomic_file(batch.out / f"{name}{suffix}") as temporary:
                shutil.copyfile(source / f"edit{suffix}", temporary)
    # The record last: with it, the edit is there.
    write_json(batch.out / f"{name}.json", read_record(source / "edit.json") | {"name": name})
    return video


def _name(out: Path, edit: EditRow) -> str:
    """The edit's own name, or one with a part of its identity, where another edit has that."""
    for name in (edit.name, f"{edit.name}-{edit.identity[:8]}"):
        record = out / f"{name}.json"
        if not record.exists() or read_record(record).get("identity") == edit.identity:
            break
    return name


def _is_whole(video: Path, identity: str) -> bool:
    record = read_record(video.with_suffix(".json"))
    whole = video.is_file() and video.with_suffix(".webp").is_file()
    return whole and record.get("identity") == identity and record.get("video") == digest(video)
