"""Masks, and what they keep of the source: blending in latents, and pasting in pixels with a feather.

A mask is 1 where the video is generated and 0 where it stays the source's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from tav_model.sampling import CLEAN

if TYPE_CHECKING:
    from tav_model.attention_control import WordMaps
    from tav_model.trajectory import Trajectory

THRESHOLD = 0.3
"""Of the maximum of a frame's attention map, as in Prompt-to-Prompt."""


def latent_mask(mask: torch.Tensor, factor: int) -> torch.Tensor:
    """Reduce a mask of pixels to latents: 1 where any pixel is above one half.

    Args:
        mask: `... f H W`, from 0 to 1.
        factor: pixels to a side of a latent.

    Returns:
        `... f H/factor W/factor`, 0 or 1, in float32.
    """
    binary = (mask > 0.5).float()
    shape = binary.shape
    pooled = functional.max_pool2d(binary.reshape(-1, 1, *shape[-2:]), factor)
    return pooled.reshape(*shape[:-2], *pooled.shape[-2:])


def pixel_masks(masks: torch.Tensor, factor: int) -> np.ndarray:
    """Return masks of latents, `... h w`, in pixels: `... H W`, each latent `factor` pixels to a side."""
    return masks.cpu().numpy().repeat(factor, axis=-2).repeat(factor, axis=-1)


def word_mask(maps: torch.Tensor, size: tuple[int, int], threshold: float = THRESHOLD) -> torch.Tensor:
    """Return the mask of where attention to words is strong, as in Prompt-to-Prompt (arXiv 2208.01626, "local blending").

    Each map is max-pooled over 3x3, resized and divided by the maximum of its frame. The mask is where the source's or
    the edit's is above the threshold.

    Args:
        maps: `2 b f h' w'`, of the source's and of the edit's words; 0 where there is no word.
        size: height and width of the latents.
        threshold: from 0 to 1.

    Returns:
        `b f h w`, 0 or 1.
    """
    _, b, f, _, _ = maps.shape
    pooled = functional.max_pool2d(maps.flatten(0, 2)[:, None], 3, stride=1, padding=1)
    resized = functional.interpolate(pooled, size=size, mode="bilinear", align_corners=False)
    largest = resized.amax(dim=(-1, -2), keepdim=True).clamp(min=torch.finfo(resized.dtype).tiny)
    above = (resized / largest > threshold).view(2, b, f, *size)
    return above.any(dim=0).float()


@dataclass(frozen=True)
class Blending:
    """Keep the source's latents outside of a mask: `x <- x* + M (x - x*)` after each step.

    (Blended Diffusion, arXiv 2111.14818; FateZero, arXiv 2303.09535; Video-P2P, arXiv 2303.04761.)

    Attributes:
        source: gives `x*`.
        mask: of pixels reduced to latents, `b f h w`; or the maps of words, whose mask changes from step to step.
        inverted: whether the video is generated outside of the mask instead.
        start: share of the steps after which blending begins.
        end: share of the steps after which it ends.
        threshold: see `word_mask`.
    """

    source: Trajectory
    mask: torch.Tensor | WordMaps
    inverted: bool = False
    start: float = 0.0
    end: float = 1.0
    threshold: float = THRESHOLD

    def current_mask(self, size: tuple[int, int]) -> torch.Tensor:
        """Return the mask as it is now, `b f h w`, for latents of height and width `size`."""
        mask = self.mask if isinstance(self.mask, torch.Tensor) else word_mask(self.mask.maps(), size, self.threshold)
        return 1 - mask if self.inverted else mask

    def blend(self, latents: torch.Tensor, step: int, timesteps: list[int]) -> torch.Tensor:
        """Return the latents `b c f h w` after step number `step` of the sampling at `timesteps`, blended."""
        num_steps = len(timesteps)
        if not self.start * num_steps <= step < self.end * num_steps:
            return latents
        reached = timesteps[step + 1] if step + 1 < num_steps else CLEAN
        source = self.source.at(reached).to(latents)
        mask = self.current_mask((latents.shape[-2], latents.shape[-1])).to(latents)[:, None]
        # lerp is exact at both ends: where the mask is 1, not a bit changes.
        return torch.lerp(source.expand_as(latents), latents, mask.expand_as(latents))


def feathered(mask: np.ndarray, feather: float) -> np.ndarray:
    """Return the weight of the edit for each pixel: 1 within the mask, falling to 0 at a distance of `feather` pixels.

    Args:
        mask: `f H W`; pixels above one half are in the mask.
        feather: pixels; up to 1 is a hard edge.

    Returns:
        `f H W` float32.
    """
    import cv2

    binary = mask > 0.5
    if feather <= 1:  # The nearest pixels outside are at a distance of 1.
        return binary.astype(np.float32)
    weights = np.zeros(binary.shape, np.float32)
    for weight, inside in zip(weights, binary, strict=True):
        if inside.any():
            distance = cv2.distanceTransform((~inside).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
            weight[:] = np.clip(1 - distance / feather, 0, 1)
    return weights


def paste(video: torch.Tensor, source: np.ndarray, mask: np.ndarray, feather: float = 8) -> torch.Tensor:
    """Return the edit within a mask and the source elsewhere; beyond the feather, the frames are exactly the source's.

    Args:
        video: the edit, `b 3 f H W` in [0, 1].
        source: the source's frames, `f H W 3` in uint8.
        mask: `f H W`, see `feathered`.
        feather: pixels around the mask in which the edit fades into the source.

    Raises:
        ValueError: shapes that do not agree.
    """
    if source.dtype != np.uint8 or source.shape != (*video.shape[2:], 3):
        f, height, width = video.shape[2:]
        raise ValueError(
            f"video: {source.dtype} of shape {source.shape} must be uint8 of shape {(f, height, width, 3)}"
        )
    if mask.shape != source.shape[:3]:
        raise ValueError(f"mask: {mask.shape} must be {source.shape[:3]}, as the video")
    original = torch.from_numpy(source.copy()).to(video).permute(3, 0, 1, 2) / 255
    weight = torch.from_numpy(feathered(mask, feather)).to(video)
    return torch.lerp(original.expand_as(video), video, weight.expand_as(video))
