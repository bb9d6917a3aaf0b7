"""Classifier-free guidance, and its proximal variant."""

from __future__ import annotations

import torch

from tav_model.frame_slices import by_frames


def guided_prediction(
    negative: torch.Tensor, text: torch.Tensor, guidance_scale: float, proximal_quantile: float | None = None
) -> torch.Tensor:
    """Return the guided prediction, `b c f h w` (Ho and Salimans, arXiv 2207.12598).

        e = e(x, negative) + g (e(x, prompt) - e(x, negative))

    With `proximal_quantile` q, the difference is soft-thresholded at the quantile q of its absolute values in each video, so
    that only the strongest changes are guided (proximal guidance, Han et al., arXiv 2306.05414, with the l1 norm; they
    use q = 0.7).

    Args:
        negative: prediction under the negative prompt, `b c f h w`.
        text: prediction under the prompt.
        guidance_scale: g.
        proximal_quantile: q, from 0 to 1; None: plain guidance.
    """
    if proximal_quantile is not None:
        return negative + guidance_scale * soft_threshold(text - negative, proximal_quantile)
    return by_frames(lambda negative, text: negative + guidance_scale * (text - negative), negative, text)


def guided_steps(start: float, end: float, num_steps: int) -> range:
    """Return the steps of a sampling that are guided, between two shares of it.

    In the first steps guidance harms the variety of results, and in the last ones it hardly changes anything (Kynkäänniemi et
    al., arXiv 2404.07724). Steps without it cost half as much.

    Args:
        start: share of the steps after which guidance begins, 0 to 1.
        end: share of the steps after which it ends.
        num_steps: number of steps.
    """
    return range(round(start * num_steps), round(end * num_steps))


def soft_threshold(difference: torch.Tensor, quantile: float) -> torch.Tensor:
    """Move every value towards 0 by the quantile of the absolute values in its video, and not beyond 0."""
    magnitude = difference.abs()
    return difference.sign() * (magnitude - quantiles(magnitude, quantile)).clamp(min=0)


def quantiles(values: torch.Tensor, quantile: float) -> torch.Tensor:
    """Return a quantile of the values of each video, `b ...` -> `b 1 ...`."""
    flat = values.flatten(1)
    # kthvalue, because torch.quantile is limited to 16 million values.
    rank = 1 + round(quantile * (flat.shape[1] - 1))
    return flat.kthvalue(rank, dim=1).values.view(-1, *[1] * (values.ndim - 1))
