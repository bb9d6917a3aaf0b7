"""Compare the pipeline's MLflow runs of each clip: what differs between them, and which one is best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tav.config.metrics import METRICS
from tav.tracking.run_names import differs
from tav.tracking.stored_runs import PipelineRun, read_runs
from tav_model.errors import TavError

TIE_BREAKERS = ("textual_alignment", "frame_consistency")


@dataclass(frozen=True)
class Comparison:
    """The runs of one clip, best first.

    Attributes:
        by: the metric that the order follows; None if no run has a score.
        metrics: every metric that any of the runs has, those of unknown direction last.
        differing: the parameters that are not the same in all of the runs.
        left_out: the number of runs without scores that are not listed.
    """

    clip: str
    by: str | None
    metrics: list[str]
    differing: list[str]
    runs: list[PipelineRun]
    left_out: int

    @property
    def has_same_edits(self) -> bool:
        """Whether the means of all runs are over the same edits, or no run says over which they are."""
        return len({run.edits_digest for run in self.runs if run.has_scores}) <= 1

    def best(self, metric: str) -> float | None:
        """Return the best value; None if the direction is unknown or fewer than two runs have a value."""
        values = [run.scores[metric] for run in self.runs if metric in run.scores]
        if metric not in METRICS or len(values) < 2:
            return None
        return max(values) if METRICS[metric].higher_is_better else min(values)


def compare(root: Path, clips: Sequence[str] = (), by: str | None = None, everything: bool = False) -> list[Comparison]:
    """Return one comparison for each clip, in the order of their names.

    Args:
        root: the project's folder, whose params.yaml names the store.
        clips: the clips to compare; empty for all that have runs.
        by: the metric to order by; None for textual_alignment or, without it, the first metric of the catalogue that a
            run has. Ties go to the better textual_alignment, then frame_consistency, then to the newer run; runs
            without the metric are last.
        everything: also list runs without scores.

    Raises:
        TavError: There is no store, no run to show, a clip has no runs, or no run has the metric.
    """
    runs = read_runs(root)
    known = sorted({run.clip for run in runs})
    for clip in clips:
        if clip not in known:
            raise TavError(f"no runs of {clip!r}; there are runs of: {', '.join(known)}")
    chosen = [run for run in runs if not clips or run.clip in clips]
    listed = [run for run in chosen if everything or run.has_scores]
    if not listed:
        raise TavError(f"none of the {len(chosen)} runs has scores yet; --all shows them")
    allowed = _known_metrics(listed)
    if by is not None and by not in allowed:
        raise TavError(f"--by: no metric {by!r} to order by; allowed: {', '.join(allowed) or 'none, without scores'}")
    return [
        _compare_clip(
            clip,
            [run for run in listed if run.clip == clip],
            by,
            left_out=sum(run.clip == clip and run not in listed for run in chosen),
        )
        for clip in sorted({run.clip for run in listed})
    ]


def _known_metrics(runs: Sequence[PipelineRun]) -> list[str]:
    """Return the metrics of the catalogue that any of the runs has, in its order."""
    return [metric for metric in METRICS if any(metric in run.scores for run in runs)]


def _compare_clip(clip: str, runs: list[PipelineRun], by: str | None, left_out: int) -> Comparison:
    metrics = _known_metrics(runs)
    unknown = {metric for run in runs for metric in run.scores} - set(metrics)
    order_by = by or (metrics[0] if metrics else None)
    parameters = dict.fromkeys(key for run in runs for key in run.parameters)
    return Comparison(
        clip=clip,
        by=order_by,
        metrics=metrics + sorted(unknown),
        differing=[key for key in parameters if differs(key, (run.parameters.get(key) for run in runs))],
        runs=sorted(runs, key=lambda run: _sort_key(run, order_by)),
        left_out=left_out,
    )


def _sort_key(run: PipelineRun, by: str | None) -> tuple[Any, ...]:
    """Return the key that sorts the best run first."""

    def badness(metric: str | None) -> float:
        if metric is None or metric not in run.scores:
            return float("inf")
        return -run.scores[metric] if METRICS[metric].higher_is_better else run.scores[metric]

    return (*(badness(metric) for metric in (by, *TIE_BREAKERS)), -run.started.timestamp(), run.run_id)


def as_rows(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Return the comparisons as plain values for JSON, one entry per run, with all of its parameters."""
    return [
        {
            "clip": comparison.clip,
            "rank": rank,
            "by": comparison.by,
            "run": run.name,
            "run_id": run.run_id,
            "started": run.started.isoformat(timespec="seconds"),
            "status": run.status,
            "finished": run.has_scores,
            "differing": {key: run.parameters.get(key) for key in comparison.differing},
            "parameters": run.parameters,
            "scores": run.scores,
            "edits": run.edits,
            "edits_digest": run.edits_digest,
        }
        for comparison in comparisons
        for rank, run in enumerate(comparison.runs, 1)
    ]
