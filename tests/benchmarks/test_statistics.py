"""Bootstrap intervals: they contain the mean, widen with the spread between clips, and are the same every time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.statistics import Interval, mean_interval, paired_difference

VALUES = st.lists(st.floats(-10, 10), min_size=1, max_size=5)
GROUPS = st.dictionaries(st.text("abcdef", min_size=1), VALUES, min_size=1, max_size=6)


@given(GROUPS)
def test_the_mean_is_that_of_all_values_and_inside(groups: dict[str, list[float]]):
    interval = mean_interval(groups, resamples=300)
    assert interval.mean == pytest.approx(np.mean([value for values in groups.values() for value in values]), abs=1e-9)
    everything = [np.mean(values) for values in groups.values()]
    assert min(everything) - 1e-9 <= interval.low <= interval.high <= max(everything) + 1e-9
    assert interval == mean_interval(groups, resamples=300)


def test_clips_are_drawn_and_not_values():
    inside = {name: [0.0, 1.0] * 10 for name in "abcdef"}
    between = {name: [float(i % 2)] * 20 for i, name in enumerate("abcdef")}
    narrow, wide = mean_interval(inside), mean_interval(between)
    assert narrow.low == narrow.high == narrow.mean == wide.mean == 0.5
    assert wide.high - wide.low > 0.5


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = []
    for seed in range(200):
        groups = {str(i): rng.normal(3, 1, 2).tolist() for i in range(15)}
        interval = mean_interval(groups, 400, seed)
        covered.append(interval.low <= 3 <= interval.high)
    assert 0.86 <= np.mean(covered) <= 0.98


def test_a_paired_difference_ignores_what_both_share():
    rng = np.random.default_rng(1)
    others = {str(i): [float(rng.normal(0, 5))] for i in range(8)}
    groups = {name: [value + 0.5] for name, [value] in others.items()}
    difference = paired_difference(groups, others)
    assert difference.mean == pytest.approx(0.5) and difference.excludes_zero
    assert not Interval(0.5, -0.1, 1.0).excludes_zero and Interval(-0.5, -1, -0.1).excludes_zero


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="at least one value"):
        mean_interval({})
    with pytest.raises(ValueError, match="at least one value"):
        mean_interval({"a": []})
    with pytest.raises(ValueError, match="the same groups"):
        paired_difference({"a": [1.0]}, {"a": [1.0, 2.0]})


def test_text():
    assert Interval(0.034, 0.01, 0.062).text("{:.1f}", 100) == "3.4 [1.0, 6.2]"
