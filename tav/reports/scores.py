"""The scores in a report: what each is called and says, those of a clip, and the heat maps of its frames."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tav.reports.figures import HeatMap, HeatScale, heat_map, heat_scale
from tav.tracking.comparison import HIGHER_IS_BETTER
from tav_model.errors import TavError
from tav_model.files import read_json


@dataclass(frozen=True)
class Metric:
    """A score of a video.

    Attributes:
        label: its name for people.
        explanation: one or two sentences.
        form: a format of one number; shares are written in percent.
    """

    key: str
    label: str
    explanation: str
    form: str = "{:.3f}"

    @property
    def higher_is_better(self) -> bool:
        return HIGHER_IS_BETTER[self.key]

    def text(self, value: float) -> str:
        return self.form.format(value).replace("-", "\N{MINUS SIGN}")


METRICS = {
    metric.key: metric
    for metric in (
        Metric(
            "textual_alignment",
            "text alignment",
            "How well the frames fit the prompt: mean cosine similarity of their CLIP embeddings with the prompt's. "
            "The source is compared with its caption.",
        ),
        Metric(
            "frame_consistency",
            "frame consistency",
            "How alike the frames are: mean cosine similarity of the CLIP embeddings of all pairs of frames. "
            "Motion lowers it too, so read it beside the source's.",
        ),
        Metric(
            "consecutive_consistency",
            "neighbour consistency",
            "Frame consistency of neighbouring frames alone.",
        ),
        Metric(
            "frame_accuracy",
            "frame accuracy",
            "Share of the frames that CLIP finds closer to the edit's prompt than to the source's caption.",
            "{:.0%}",
        ),
        Metric(
            "pick_score", "PickScore", "What people would prefer, as a model learned it from their choices.", "{:.2f}"
        ),
        Metric(
            "attributes_edited",
            "edited right",
            "Share of what the edit was to change (object, colour, place, style) that is seen as it should be.",
            "{:.0%}",
        ),
        Metric(
            "attributes_kept", "kept", "Share of what the edit was to leave alone that is still as it was.", "{:.0%}"
        ),
        Metric(
            "consistency_to_truth",
            "consistency to truth",
            "Frame consistency, less that of the true video: below 0 the edit changes from frame to frame more than it "
            "should.",
            "{:+.3f}",
        ),
        Metric(
            "psnr_to_truth", "PSNR to truth", "Likeness to the true video, pixel by pixel, in decibels.", "{:.1f} dB"
        ),
        Metric(
            "track_error",
            "track error",
            "How far the object is from where it should be, as a share of the picture's width.",
            "{:.1%}",
        ),
        Metric(
            "warping_error",
            "warping error",
            "How much things change their look while they move as in the source: mean squared difference of "
            "neighbouring frames along the source's motion.",
            "{:.4f}",
        ),
        Metric(
            "flicker",
            "flicker",
            "Mean change of brightness from frame to frame. Motion adds to it, so read it beside the source's.",
            "{:.3f}",
        ),
        Metric("excess_flicker", "excess flicker", "The flicker of the edit, less the source's.", "{:+.3f}"),
    )
}
HEADLINES = ("textual_alignment", "frame_consistency", "track_error", "warping_error")
"""The scores to show first, as far as an edit has them."""


@dataclass(frozen=True)
class Scores:
    """What the score stage has left.

    Attributes:
        source, mean: by metric; the mean is over the edits.
        edits: by name and prompt, so that scores of another prompt are nobody's.
    """

    source: dict[str, float]
    mean: dict[str, float]
    edits: dict[tuple[str, str], dict[str, float]]

    def of(self, name: str, prompt: str) -> dict[str, float]:
        """The scores of one edit; empty where this one was not scored."""
        return self.edits.get((name, prompt), {})

    @property
    def columns(self) -> list[Metric]:
        """The metrics that any video has."""
        there = {name for values in (self.source, self.mean, *self.edits.values()) for name in values}
        return [metric for name, metric in METRICS.items() if name in there]

    @property
    def headlines(self) -> list[Metric]:
        return [METRICS[name] for name in HEADLINES if name in self.mean]

    def best(self) -> dict[str, str]:
        """The best of each metric as it is written, where the edits differ in that."""
        best = {}
        for metric in self.columns:
            values = [scores[metric.key] for scores in self.edits.values() if metric.key in scores]
            if len({metric.text(value) for value in values}) > 1:
                best[metric.key] = metric.text(max(values) if metric.higher_is_better else min(values))
        return best


def read_clip_scores(folder: Path) -> Scores | None:
    """The scores in `folder`; None where there are none.

    Raises:
        TavError: files that are missing or damaged.
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


def _known(values: Mapping[str, str | float]) -> dict[str, float]:
    """The numbers of the metrics that are there."""
    return {name: float(values[name]) for name in METRICS if values.get(name) not in (None, "")}


@dataclass(frozen=True)
class HeatMaps:
    """The heat maps of a clip's videos, all on one scale of colours.

    Attributes:
        source: None where no CLIP model has scored.
        edits: by name.
    """

    scale: HeatScale
    source: HeatMap | None
    edits: dict[str, HeatMap]


def read_heat_maps(folder: Path, names: Sequence[str]) -> HeatMaps | None:
    """The heat maps of the source and of these edits; None where the scores have no such file.

    Raises:
        TavError: the file is damaged.
    """
    path = folder / "consistency.json"
    if not path.exists():
        return None
    record = read_json(path)
    try:
        source = record["source"]
        edits = {name: record["edits"][name] for name in names if name in record["edits"]}
        matrices = [*([source] if source else []), *edits.values()]
        least = min((min(map(min, rows)) for rows in matrices), default=1.0)
        low = min(math.floor(20 * least) / 20, 0.95)
        maps = {name: heat_map(rows, low) for name, rows in edits.items()}
        return HeatMaps(heat_scale(low), heat_map(source, low) if source else None, maps)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise TavError(f"{path}: not the similarities of frames ({type(error).__name__}: {error})") from None
