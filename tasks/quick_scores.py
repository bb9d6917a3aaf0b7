"""Score quick edits, so that the report shows them like the others: `results/CLIP/quick/scores/NAME.json`.

Each edit is measured once, and again only if the source, the caption or the scoring models have changed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.score import load_judge, rounded
from tav.config import ScoreParams
from tav.config.results import read_record
from tav.reports.scores import QUICK_SCORES
from tav_model.digests import digest
from tav_model.errors import TavError
from tav_model.files import write_json

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)


def score_quick_edits(
    quick: Path,
    names: Sequence[str],
    frames: Path,
    *,
    caption: str,
    params: ScoreParams,
    resolve_model: Callable[[str], str],
    device: str,
    kept: Callable[[Path], np.ndarray | None] = lambda _: None,
) -> None:
    """Write the scores of quick edits that have none yet, and remove those of edits that are not in `names`.

    An edit that cannot be measured is logged, and the others are measured.

    Args:
        quick: the folder of the quick edits.
        names: the edits that belong to the clip's present tuning and inversion.
        frames: folder of the source clip.
        caption: the prompt that describes the source.
        params: the models that score.
        resolve_model: turns the name of a model in the parameters into a folder or hub id.
        device: the device that the models run on.
        kept: as for `tasks.score.score`.

    Raises:
        TavError: a model or the source is missing.
    """
    out = quick / QUICK_SCORES
    for path in out.glob("*.json"):
        if path.stem not in names:
            path.unlink()
    source_path = frames / "source.mp4"
    inputs = digest(source_path, caption, params.model_dump_json())
    todo = [name for name in names if not _is_scored(read_record(out / f"{name}.json"), quick / f"{name}.mp4", inputs)]
    if not todo:
        return
    judge = load_judge(frames, caption, params, resolve_model, device, None, (), kept)
    source = judge.measure_source(source_path)
    for name in todo:
        video = quick / f"{name}.mp4"
        try:
            edit = judge.measure(video, read_record(quick / f"{name}.json")["prompt"], source=source)
        except TavError as error:
            logger.warning("not scored: %s", error)
            continue
        record = {
            "video": digest(video),
            "inputs": inputs,
            "source": rounded(source.scores),
            "scores": rounded(edit.scores),
            "consistency": edit.similarities,
        }
        write_json(out / f"{name}.json", record)


def _is_scored(record: Mapping[str, Any], video: Path, inputs: str) -> bool:
    return record.get("inputs") == inputs and record.get("video") == digest(video)
