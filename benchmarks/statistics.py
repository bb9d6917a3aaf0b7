"""Means over clips with bootstrap intervals (Efron and Tibshirani, An Introduction to the Bootstrap, 1993)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and its interval of confidence.

    Attributes:
        mean: mean over all values.
        low: lower end of the 95 % interval.
        high: upper end.
    """

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the mean differs from 0 significantly."""
        return self.low > 0 or self.high < 0

    def text(self, number_format: str, factor: float = 1.0) -> str:
        """Return "MEAN [LOW, HIGH]", each multiplied by a factor."""
        mean, low, high = (number_format.format(factor * value) for value in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]"


def mean_interval(groups: Mapping[str, Sequence[float]], resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Return the mean of all values, with an interval from drawing groups with replacement.

    Values of one clip resemble each other, as they share the clip's latents and tuned weights. Drawing complete clips
    accounts for that.

    Args:
        groups: the values of each clip, at least one.
        resamples: number of draws.
        seed: seed of the draws.

    Raises:
        ValueError: no group, or one without values.
    """
    if not groups or not all(len(values) for values in groups.values()):
        raise ValueError("each group must have at least one value")
    sums = np.array([np.sum(values, dtype=np.float64) for values in groups.values()])
    counts = np.array([len(values) for values in groups.values()])
    drawn = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return Interval(float(sums.sum() / counts.sum()), float(low), float(high))


def paired_difference(
    groups: Mapping[str, Sequence[float]],
    others: Mapping[str, Sequence[float]],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the mean of `groups` minus `others`, value by value, with an interval from drawing clips.

    Raises:
        ValueError: the groups do not have the same names and numbers of values.
    """
    if {name: len(values) for name, values in groups.items()} != {name: len(values) for name, values in others.items()}:
        raise ValueError("both must have the same groups with the same numbers of values")
    differences = {name: [a - b for a, b in zip(values, others[name], strict=True)] for name, values in groups.items()}
    return mean_interval(differences, resamples, seed)
