"""Noise regularisation: what it changes, and what it leaves."""

import pytest
import torch
from torch.nn import functional

from tav_model import ddim_inversion
from tav_model.noise_regularization import autocorrelation_loss, regularized
from tests.support.models import CONTEXT_DIM, noise, relative, scheduler, video_unet

SHAPE = (1, 4, 3, 16, 16)


def smooth(strength=0.5):
    """Noise with correlated neighbours, of deviation 1."""
    white = noise(*SHAPE)
    blurred = functional.avg_pool3d(white, (1, 3, 3), stride=1, padding=(0, 1, 1))
    mixed = strength * blurred / blurred.std() + (1 - strength) * white
    return mixed / mixed.std()


def correlation(x):
    return ((x * x.roll(1, -1)).mean() / x.square().mean()).item()


def test_loss_is_the_sum_of_squared_autocorrelations():
    x = noise(1, 2, 1, 16, 16)
    expected = 0.0
    for channel in range(2):
        fine = x[0, channel, 0]
        coarse = torch.stack([fine[i::2, j::2] for i in (0, 1) for j in (0, 1)]).sum(0) / 2
        for image, weight in ((fine, 1), (coarse, 1 / 4)):
            for i, j in ((1, 0), (0, 1)):
                side = len(image)
                products = [
                    image[y, x] * image[(y - i) % side, (x - j) % side] for y in range(side) for x in range(side)
                ]
                expected += weight * (sum(products) / side**2) ** 2
    torch.testing.assert_close(autocorrelation_loss(x), expected)


def test_neighbours_are_decorrelated():
    x = smooth()
    y = regularized(x, 0.2)
    assert correlation(x) > 0.35 and abs(correlation(y)) < 0.6 * correlation(x)
    assert autocorrelation_loss(y) < 0.8 * autocorrelation_loss(x)


@pytest.mark.parametrize(("mean", "deviation"), [(0.5, 1.0), (0.0, 0.5), (-0.3, 2.0)])
def test_mean_and_deviation_move_towards_those_of_the_standard_normal(mean, deviation):
    x = mean + deviation * noise(*SHAPE)
    y = regularized(x, 0.1)
    assert abs(y.mean()) <= 0.65 * abs(x.mean()) + 1e-3
    assert abs(y.std() - 1) <= 0.65 * abs(x.std() - 1) + 0.02


def test_white_noise_stays():
    assert relative(regularized(noise(*SHAPE), 0.1), noise(*SHAPE)) < 0.1


def test_constant_noise_is_not_blown_up():
    y = regularized(1e-6 * noise(*SHAPE), 0.5)
    assert torch.isfinite(y).all() and y.abs().max() < 1e-3


def test_no_strength_changes_nothing():
    x = smooth()
    assert regularized(x, 0) is x


def test_inversion_takes_the_regularised_noise():
    unet, base, text = video_unet(), scheduler(), noise(1, 7, CONTEXT_DIM)
    x = smooth()
    ours = ddim_inversion(unet, base, x, text, 1, regularization=0.3)[-1]
    with torch.no_grad():
        epsilon = regularized(unet(x, 1, text).sample, 0.3)
    a, a_next = base.alphas_cumprod[0], base.alphas_cumprod[1]
    expected = a_next.sqrt() * (x - (1 - a).sqrt() * epsilon) / a.sqrt() + (1 - a_next).sqrt() * epsilon
    assert relative(ours, expected) < 1e-5
    assert not torch.equal(ours, ddim_inversion(unet, base, x, text, 1)[-1])


@pytest.mark.parametrize("strength", [-0.1, 0.6])
def test_strengths_that_are_not_allowed(strength):
    with pytest.raises(ValueError, match=rf"regularization: {strength} must be from 0 to 0.5"):
        ddim_inversion(
            video_unet(), scheduler(), noise(1, 4, 1, 8, 8), noise(1, 7, CONTEXT_DIM), 2, regularization=strength
        )
