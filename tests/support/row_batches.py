"""Batches of rows in a folder that has the outputs of the stages before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.rows import RowBatch
from tav.config import AttentionParams, EditParams
from tav.config.prompts import PromptRow


def row_batch(project: Path, rows: Sequence[PromptRow], params: EditParams, pipeline: Any, **others: Any) -> RowBatch:
    """A batch on the CPU, which renders with this pipeline."""
    batch = RowBatch(
        rows,
        project / "inverted",
        project / "tuned",
        project / "edits",
        root=project,
        base=str(project / "base"),
        attention=AttentionParams(),
        params=params,
        seed=1,
        device="cpu",
        store=project / "store",
        **others,
    )
    batch.pipeline = pipeline
    return batch
