"""What is logged of a tuning, beside what it reports itself."""

import numpy as np
import pytest

from tasks.runs import SmoothedLoss, peak_memory


def test_loss_is_smoothed_within_its_range_of_timesteps():
    smoothed = SmoothedLoss()
    assert smoothed.update(1.0, 0) == {"loss.timesteps_0_to_250": 1.0}
    assert smoothed.update(5.0, 999) == {"loss.timesteps_750_to_1000": 5.0}
    assert smoothed.update(2.0, 249.5) == {"loss.timesteps_0_to_250": pytest.approx(1.1)}
    assert smoothed.update(3.0, 250) == {"loss.timesteps_250_to_500": 3.0}
    assert smoothed.update(4.0, 1200) == {"loss.timesteps_750_to_1000": pytest.approx(4.9)}


def test_peak_memory_grows_with_what_is_held():
    before = peak_memory()
    held = np.ones(int((before + 0.2) * 2**30), np.uint8)
    assert 0.01 < before < peak_memory() < 200 and held.sum()
