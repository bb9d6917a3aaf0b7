"""Fresh noise in the first latents of an edit, which frees a new object from the shape and the pattern of the old one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tav_model.trajectory import channel_deviation, channel_mean


def with_fresh_noise(latents: torch.Tensor, mask: torch.Tensor, share: float, seeds: Sequence[int]) -> torch.Tensor:
    """Return latents that are mixed with fresh noise within a mask, `b c f h w`.

    Inverted latents hold the object that they come from, and what is sampled from them has its outline. The mixture has the
    mean m and the deviation d of the latents, by channel:

        x' = m + d (sqrt(1 - k^2) (x - m) / d + k n).

    The noise n is the same in all frames but moves with the centroid of the mask, by whole positions: noise that moves with
    what it becomes is what keeps it alike from frame to frame (as in warped noise, Chang et al., arXiv 2504.03072), and
    unlike interpolated noise it stays white.

    Args:
        latents: the first latents, `b c f h w`.
        mask: where the noise is mixed in, `b f h w` or `1 f h w`, 0 or 1.
        share: k, from 0 to 1.
        seeds: of the noise of each of the b videos. It does not depend on the number of frames, nor on the rest of the batch.
    """
    b, c, f, h, w = latents.shape
    mask = mask.expand(b, f, h, w)
    noise = torch.empty(latents.shape)
    for video, part, seed in zip(noise, mask, seeds, strict=True):
        canvas = torch.randn((c, 2 * h - 1, 2 * w - 1), generator=torch.Generator().manual_seed(seed))
        for frame, row, column in zip(video.unbind(1), *_centroids(part), strict=True):
            top, left = h - 1 - row, w - 1 - column
            frame.copy_(canvas[:, top : top + h, left : left + w])
    noise = noise.to(latents)
    mean = channel_mean(latents)
    mixed = mean + (1 - share**2) ** 0.5 * (latents - mean) + share * channel_deviation(latents) * noise
    return torch.where(mask[:, None] > 0, mixed, latents)


def _centroids(mask: torch.Tensor) -> tuple[list[int], list[int]]:
    """Return the rows and the columns of the centroids of `f h w`; those of the middle where nothing is in the mask."""
    _, h, w = mask.shape
    weights = mask.cpu().double()  # In this order: Apple's GPUs have no doubles.
    weights = torch.where(weights.sum((1, 2), keepdim=True) > 0, weights, torch.ones_like(weights))
    total = weights.sum((1, 2))
    rows = (weights.sum(2) @ torch.arange(h, dtype=torch.double)) / total
    columns = (weights.sum(1) @ torch.arange(w, dtype=torch.double)) / total
    return rows.round().int().tolist(), columns.round().int().tolist()
