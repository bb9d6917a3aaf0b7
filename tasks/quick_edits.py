"""Quick edits: prompts rendered from a clip's tuning and inversion at once, beside the pipeline.

They go to `results/CLIP/quick/`, which DVC does not track. An edit that was rendered before, here or by the stage `edit`,
with the same prompt, settings and inputs, is found and not rendered again.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.clip_stages import ClipStages
from tasks.edit import edit_progress
from tasks.rows import RowBatch, render_rows
from tav.config.prompt_words import unknown_words_warning
from tav.config.prompts import EditRow, PromptRow
from tav.config.results import EDIT_SUFFIXES, read_record
from tav_model.digests import digest
from tav_model.errors import TavError
from tav_model.files import atomic_file, write_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuickEditResult:
    """One prompt's video, or why there is none.

    Attributes:
        rendered: False where the video was found.
        error: None where there is a video.
    """

    prompt: str
    video: Path | None
    rendered: bool = False
    error: str | None = None


def quick_edits(stages: ClipStages, rows: Sequence[PromptRow]) -> Iterator[QuickEditResult]:
    """Yield each row's edit as soon as its video is there, and score all at the end; one that fails, fails alone.

    Raises:
        TavError: the clip is not tuned and inverted, or another process works on it.
        FullDiskError: the disk is full; the edits yielded so far are kept.
    """
    check_ready(stages)
    with stages.quick_session() as slot:
        if warning := unknown_words_warning(stages.root, stages.params.base_model, [row.prompt for row in rows]):
            logger.warning(warning)
        batch = stages.quick_batch(rows, slot.device)
        with edit_progress(batch, stages.events, stages.clip) as progress:
            for result in render_rows(batch, batch.rows, stages.events, stages.clip, progress):
                video = None if result.error else _publish(batch, result.row)
                yield QuickEditResult(result.row.prompt, video, result.rendered, result.error)
        stages.score_quick(slot.device)


def check_ready(stages: ClipStages) -> None:
    """Check that the clip is tuned and inverted. Raises TavError where it is not."""
    tuned, inverted = stages.project.tuned(stages.clip), stages.project.inverted(stages.clip)
    needed = (tuned / "tuned.json", tuned / "tuned.safetensors", inverted / "inverted.safetensors")
    if not all(path.is_file() for path in needed):
        raise TavError(f"{stages.clip}: not tuned and inverted yet; tav run {stages.clip} does it")


def _publish(batch: RowBatch, row: EditRow) -> Path:
    """Copy a rendered edit under its name into the results, unless it is there; returns the video's path."""
    name = _name(batch.out, row)
    video = batch.out / f"{name}.mp4"
    if _is_published(video, row.identity):
        return video
    source = batch.store / row.identity
    for suffix in EDIT_SUFFIXES:
        if suffix != ".json":
            with atomic_file(batch.out / f"{name}{suffix}") as temporary:
                shutil.copyfile(source / f"edit{suffix}", temporary)
    # The record comes last: an edit with a record is complete.
    write_json(batch.out / f"{name}.json", read_record(source / "edit.json") | {"name": name})
    return video


def _name(out: Path, row: EditRow) -> str:
    """Return the edit's own name, or one with a part of its identity where another edit has that name."""
    for name in (row.name, f"{row.name}-{row.identity[:8]}"):
        record = out / f"{name}.json"
        if not record.exists() or read_record(record).get("identity") == row.identity:
            break
    return name


def _is_published(video: Path, identity: str) -> bool:
    record = read_record(video.with_suffix(".json"))
    complete = video.is_file() and video.with_suffix(".webp").is_file()
    return complete and record.get("identity") == identity and record.get("video") == digest(video)
