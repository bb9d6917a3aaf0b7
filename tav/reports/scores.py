"""The scores and the heat maps of a clip, as its report shows them."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tav.config.metrics import HEADLINES, METRICS, Metric
from tav.config.results import read_record
from tav.reports.figures import HeatMap, HeatScale, heat_map, heat_scale
from tav_model.digests import digest
from tav_model.errors import TavError
from tav_model.files import read_json

# Folder of the scores of quick edits, in the folder of the quick edits.
QUICK_SCORES = "scores"


@dataclass(frozen=True)
class Scores:
    """What the score stage has written.

    Attributes:
        source: the source's scores by metric.
        mean: the means over the edits by metric.
        edits: the scores of each edit, by its name and prompt, so that scores of an earlier prompt belong to no edit.
    """

    source: dict[str, float]
    mean: dict[str, float]
    edits: dict[tuple[str, str], dict[str, float]]

    def of(self, name: str, prompt: str) -> dict[str, float]:
        """Return the scores of one edit; empty if this prompt has not been scored."""
        return self.edits.get((name, prompt), {})

    @property
    def columns(self) -> list[Metric]:
        """The metrics that any video has."""
        return [
            metric
            for key, metric in METRICS.items()
            if any(key in values for values in (self.source, self.mean, *self.edits.values()))
        ]

    @property
    def headlines(self) -> list[Metric]:
        """The metrics to show first."""
        return [metric for metric in HEADLINES if metric in self.columns]

    def best(self) -> dict[str, str]:
        """Return the best value of each metric as it is written, for the metrics in which the edits differ."""
        best = {}
        for metric in self.columns:
            values = [scores[metric.key] for scores in self.edits.values() if metric.key in scores]
            if len({metric.text(value) for value in values}) > 1:
                best[metric.key] = metric.text(max(values) if metric.higher_is_better else min(values))
        return best


def read_clip_scores(folder: Path) -> Scores | None:
    """Return the scores in a folder; None if the clip has not been scored.

    Raises:
        TavError: A file is missing or damaged.
    """
    if not (folder / "metrics.json").exists():
        return None
    metrics = read_json(folder / "metrics.json")
    try:
        with (folder / "scores.csv").open(newline="", encoding="utf-8") as stream:
            edits = {(row["name"], row["prompt"]): _known(row) for row in csv.DictReader(stream)}
        return Scores(_known(metrics["source"]), _known(metrics["mean"]), edits)
    except FileNotFoundError:
        raise TavError(f"{folder / 'scores.csv'}: no such file") from None
    except (KeyError, TypeError, ValueError, AttributeError, csv.Error) as error:
        raise TavError(f"{folder}: not the scores of a clip ({type(error).__name__}: {error})") from None


@dataclass(frozen=True)
class QuickScores:
    """The scores of one quick edit, as `tasks.quick_scores` has written them.

    Attributes:
        source: the source's scores by metric.
        scores: the edit's scores by metric.
        similarities: of all pairs of frames; None without a CLIP model.
    """

    source: dict[str, float]
    scores: dict[str, float]
    similarities: list[list[float]] | None


def read_quick_scores(folder: Path, video: Path) -> QuickScores | None:
    """Return the scores of a quick edit; None if it has none, or has changed since.

    Args:
        folder: of the quick edits.
        video: the edit's.
    """
    record = read_record(folder / QUICK_SCORES / f"{video.stem}.json")
    try:
        if record["video"] != digest(video):
            return None
        return QuickScores(_known(record["source"]), _known(record["scores"]), record["consistency"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return None  # They are written again with the next quick edit.


def with_quick_scores(scores: Scores | None, quick: Mapping[tuple[str, str], QuickScores]) -> Scores | None:
    """Return scores with those of quick edits, by name on the page and prompt; the means remain those of the CSV."""
    if not quick:
        return scores
    if scores is None:
        scores = Scores(next(iter(quick.values())).source, {}, {})
    return replace(scores, edits=scores.edits | {key: one.scores for key, one in quick.items()})


def _known(values: Mapping[str, str | float]) -> dict[str, float]:
    """Return the values of known metrics as numbers."""
    return {name: float(values[name]) for name in METRICS if values.get(name) not in (None, "")}


@dataclass(frozen=True)
class HeatMaps:
    """The heat maps of a clip's videos, all with one colour scale.

    Attributes:
        scale: the colour scale.
        source: None if the clip was scored without a CLIP model.
        edits: by name.
    """

    scale: HeatScale
    source: HeatMap | None
    edits: dict[str, HeatMap]


def read_heat_maps(
    folder: Path,
    names: Sequence[str],
    quick: Mapping[str, list[list[float]]] | None = None,
    num_frames: int | None = None,
) -> HeatMaps | None:
    """Return the heat maps of the source and of some edits; None if there is no file of similarities.

    Args:
        folder: with the scores.
        names: of the edits.
        quick: the similarities of further edits, by name.
        num_frames: of the videos; the similarities of long ones are those of some frames.

    Raises:
        TavError: The file is damaged.
    """
    path = folder / "consistency.json"
    if not path.exists():
        return None
    record = read_json(path)
    try:
        source = record["source"]
        edits = {name: record["edits"][name] for name in names if name in record["edits"]}
        edits |= (quick or {}) if source else {}
        matrices = [*([source] if source else []), *edits.values()]
        smallest = min((min(map(min, rows)) for rows in matrices), default=1.0)
        low = min(math.floor(20 * smallest) / 20, 0.95)
        maps = {name: heat_map(rows, low, num_frames) for name, rows in edits.items()}
        return HeatMaps(heat_scale(low), heat_map(source, low, num_frames) if source else None, maps)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise TavError(f"{path}: not the similarities of frames ({type(error).__name__}: {error})") from None
