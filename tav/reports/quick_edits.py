"""The quick edits of a clip on its report: those that are scored, which means that they belong to the present tuning."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from tav.config.results import read_record
from tav.reports.scores import QuickScores, read_quick_scores
from tav.reports.videos import RenderedEdit, edit_paths, read_edit
from tav_model.errors import TavError

MOST = 24  # Newest first: each video is embedded in the page.
NAME = "quick/{}"
"""The name of a quick edit on the page, which differs from every name in the CSV."""


@dataclass(frozen=True)
class QuickEdits:
    """The quick edits that the page shows.

    Attributes:
        edits: the edits, ordered by name.
        scores: of each, by its name on the page and its prompt.
        left_out: how many others there are.
    """

    edits: list[RenderedEdit] = field(default_factory=list)
    scores: dict[tuple[str, str], QuickScores] = field(default_factory=dict)
    left_out: int = 0


def read_quick_edits(folder: Path, caption: str, others: Collection[str], page: Path | None = None) -> QuickEdits:
    """Read the quick edits in a folder.

    Args:
        folder: of the quick edits; may be missing.
        caption: the clip's.
        others: identities of the CSV's edits, which are on the page already.
        page: links the videos from there.
    """
    found = [path for path in edit_paths(folder) if _identity(path) not in others]
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    shown: dict[Path, tuple[RenderedEdit, QuickScores]] = {}
    for path in found:
        scores = read_quick_scores(folder, path)
        if scores is None or len(shown) == MOST:
            continue
        try:
            shown[path] = read_edit(path, NAME.format(path.stem), caption, page=page), scores
        except TavError:
            continue  # Being written, or damaged.
    ordered = [shown[path] for path in sorted(shown)]
    return QuickEdits(
        [edit for edit, _ in ordered],
        {(edit.name, edit.prompt): scores for edit, scores in ordered},
        len(found) - len(ordered),
    )


def _identity(path: Path) -> str:
    return str(read_record(path.with_suffix(".json")).get("identity", path.stem))
