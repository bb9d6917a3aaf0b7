"""Masks of what a prompt changes: where the predictions of the clean latents for it and for the caption differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from tav_model.guidance import quantiles
from tav_model.sampling import predicted_clean_and_noise

if TYPE_CHECKING:
    from tav_model.trajectory import Trajectory

DIFFERENCE_THRESHOLD = 0.05
"""The lowest threshold, in deviations of the clean latents, which are scaled to a deviation of 1."""
STRONGEST, SHARE_OF_STRONGEST = 0.95, 0.25
"""The threshold is at least this share of the differences' quantile: a strong change at one place shifts the predictions
everywhere a little."""
SHARES = (0.6, 0.7, 0.8)
"""Shares of the inversion's steps. Closer to the clean latents, the prompt has nothing left to decide; closer to pure noise,
where objects are is not yet decided."""

WHOLE = 0.7
"""Share of the clip, with the positions around a mask, above which the mask is one of everything. Edits of the light change
the complete picture, but not everywhere by as much as the threshold."""
EVERYWHERE = 0.9
"""Share of the clip with differences above the lowest threshold for which the mask is one of everything as well: where an edit
changes the light and something else, that is much stronger than the light. Of twelve edits of the ground and the light of the
embedded world, one kept its light without this, with all others unchanged."""


def difference_mask(
    predict: Callable[[torch.Tensor, int], torch.Tensor], source: Trajectory, threshold: float = DIFFERENCE_THRESHOLD
) -> torch.Tensor:
    """Return the mask of what prompts change of the source, as in DiffEdit (Couairon et al., arXiv 2210.11427).

    From the source's latents at three noise levels, the clean latents are predicted for the caption and for each prompt. The
    mask is where the root mean square of their difference over the channels, averaged over the levels, is above a threshold.
    DiffEdit adds random noise to the clean latents, compares predictions of the noise, and divides by the maximum. Here, the
    latents are the trajectory's, so that no noise is drawn, and the threshold is relative to the strongest differences, but
    never below an absolute one: a prompt that changes nearly everything, such as the light, has a mask of everything, and the
    caption itself an empty one.

    Args:
        predict: called with latents `1 c f h w` and their timestep; returns the network's predictions for the caption and
            for each of b prompts, `(1 + b) c f h w`.
        source: the trajectory of the inversion.
        threshold: the lowest one, in deviations of the clean latents.

    Returns:
        `b f h w`, 0 or 1, in float32.
    """
    last = len(source.timesteps) - 1
    levels = [source.timesteps[max(round(share * last), 1)] for share in SHARES]
    differences = []
    for timestep in levels:
        latents = source.at(timestep)
        predicted = predict(latents, timestep)
        clean, _ = predicted_clean_and_noise(source.scheduler, predicted, timestep, latents.to(predicted))
        differences.append((clean[1:] - clean[:1]).square().mean(dim=1).sqrt())
    difference = torch.stack(differences).mean(dim=0)
    strongest = quantiles(difference, STRONGEST)
    mask = (difference > (SHARE_OF_STRONGEST * strongest).clamp(min=threshold)).float()
    around = functional.max_pool2d(mask, 3, stride=1, padding=1)
    is_whole = (_share(around) > WHOLE) | (_share((difference > threshold).float()) > EVERYWHERE)
    return torch.where(is_whole, torch.ones_like(mask), mask)


def _share(mask: torch.Tensor) -> torch.Tensor:
    return mask.mean(dim=(1, 2, 3), keepdim=True)
