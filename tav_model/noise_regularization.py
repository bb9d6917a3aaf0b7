"""Noise regularisation: keep the noise that an inversion predicts near white Gaussian noise."""

from __future__ import annotations

import torch
from torch.nn import functional

ITERATIONS = 5
SMALLEST = 8  # Positions of the coarsest level to a side, as in pix2pix-zero.


def autocorrelation_loss(noise: torch.Tensor) -> torch.Tensor:
    """Return the squared autocorrelation of noise `b c f h w` with its neighbours below and to the right, at several sizes.

    It is that of pix2pix-zero (arXiv 2302.03027, equation 4) with shifts by one position. Noise is averaged over 2x2
    positions from size to size, and multiplied by 2, which leaves white noise white. Sizes are weighted by their number of
    positions, so that a gradient step acts on all of them alike.
    """
    images = noise.flatten(0, 2)[:, None]
    loss, weight = torch.zeros((), dtype=noise.dtype, device=noise.device), 1.0
    while True:
        for dim in (2, 3):
            loss = loss + weight * (images * images.roll(1, dim)).mean(dim=(2, 3)).square().sum()
        if min(images.shape[2:]) <= SMALLEST:
            return loss
        images, weight = 2 * functional.avg_pool2d(images, 2), weight / 4


def regularized(noise: torch.Tensor, strength: float) -> torch.Tensor:
    """Return noise, `b c f h w`, after five gradient steps towards white Gaussian noise.

    A step reduces `autocorrelation_loss`, and the Kullback-Leibler divergence `(s^2 + m^2 - 1 - log s^2) / 2` of each
    channel's mean m and deviation s from the standard normal distribution (pix2pix-zero, equation 3; ReNoise, arXiv
    2403.14602). Gradients are multiplied by the number of elements, so that `strength` does not depend on the size.

    Args:
        noise: predicted by the model.
        strength: length of the steps, 0 to 0.5; 0 returns the noise unchanged.
    """
    if not strength:
        return noise
    positions = noise.shape[-1] * noise.shape[-2]
    for _ in range(ITERATIONS):
        with torch.enable_grad():
            variable = noise.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(autocorrelation_loss(variable), variable)
        noise = noise - strength * positions * gradient / 4
        mean = noise.mean(dim=(2, 3, 4), keepdim=True)
        variance = noise.var(dim=(2, 3, 4), keepdim=True, correction=0)
        # Without the limit, nearly constant noise would be blown up.
        pull = (1 - 1 / variance.clamp(min=1e-8)).clamp(min=-1)
        noise = noise - strength * (mean + pull * (noise - mean))
    return noise
