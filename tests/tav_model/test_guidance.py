"""Guidance and its proximal variant."""

import pytest
import torch

from tav_model.guidance import guided_prediction, guided_steps, soft_threshold
from tests.support.models import noise, relative

SHAPE = (2, 4, 3, 5, 5)


def test_plain_guidance_is_its_formula():
    negative, text = noise(*SHAPE), noise(*SHAPE, seed=1)
    assert torch.equal(guided_prediction(negative, text, 7.5), negative + 7.5 * (text - negative))


@pytest.mark.parametrize("quantile", [0.3, 0.7, 0.95])
def test_proximal_guidance_leaves_the_strongest_differences(quantile):
    negative, text = noise(*SHAPE), noise(*SHAPE, seed=1)
    difference = text - negative
    guided = guided_prediction(negative, text, 7.5, quantile)
    for i in range(2):
        threshold = torch.quantile(difference[i].abs(), quantile)
        expected = torch.where(
            difference[i] > threshold,
            difference[i] - threshold,
            torch.where(difference[i] < -threshold, difference[i] + threshold, 0.0),
        )
        assert relative((guided[i] - negative[i]) / 7.5, expected) < 0.05  # The quantile is not interpolated.
        unchanged = guided[i] == negative[i]
        assert unchanged.float().mean().item() == pytest.approx(quantile, abs=0.01)


def test_quantile_0_is_nearly_plain_and_1_is_no_guidance():
    negative, text = noise(*SHAPE), noise(*SHAPE, seed=1)
    assert relative(guided_prediction(negative, text, 3.5, 0), guided_prediction(negative, text, 3.5)) < 0.01
    assert torch.equal(guided_prediction(negative, text, 3.5, 1), negative)


def test_threshold_of_a_video_does_not_depend_on_the_batch():
    difference = noise(*SHAPE) * torch.tensor([1.0, 10.0])[:, None, None, None, None]
    together = soft_threshold(difference, 0.7)
    for i in range(2):
        assert torch.equal(together[i : i + 1], soft_threshold(difference[i : i + 1], 0.7))


@pytest.mark.parametrize(
    ("start", "end", "num_steps", "steps"),
    [
        (0.0, 1.0, 5, [0, 1, 2, 3, 4]),
        (0.2, 1.0, 5, [1, 2, 3, 4]),
        (0.0, 0.7, 10, [0, 1, 2, 3, 4, 5, 6]),
        (0.3, 0.3, 10, []),
        (0.6, 0.4, 10, []),
        (0.0, 0.5, 1, []),
    ],
)
def test_guided_steps(start, end, num_steps, steps):
    assert list(guided_steps(start, end, num_steps)) == steps
