"""How well an edit came out, against the rendered truth: the object's track, what was to change, what was to stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from tav_model.metrics.clip import ClipScorer, frame_consistency

from .backdrops import SIDE
from .captions import phrase
from .renderer import render
from .scenes import ATTRIBUTES, Scene
from .truth import track_error

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Verdict:
    """Of one edited video; every number is a mean over its frames.

    Attributes:
        track_error: distance of the object from its true place, as a share of the picture's width.
        attributes_edited: share of the edited attributes that the scorer names right.
        attributes_kept: share of the other attributes that the scorer names as they were.
        consistency_to_truth: frame consistency (arXiv 2212.11565), less that of the true video.
        psnr_to_truth: in decibels.
    """

    track_error: float
    attributes_edited: float
    attributes_kept: float
    consistency_to_truth: float
    psnr_to_truth: float


class Judge:
    """Names attributes with a scorer: by which of the phrases for its values a picture is closest to.

    Args:
        scorer: a CLIP of the world.
    """

    def __init__(self, scorer: ClipScorer) -> None:
        self.scorer = scorer
        self.phrases = {
            name: scorer.embed_texts([phrase(name, value) for value in values]) for name, values in ATTRIBUTES.items()
        }

    def named(self, frames: np.ndarray) -> dict[str, list[str]]:
        """The value of each attribute in each frame; ``frames``: `f h w c` uint8."""
        images = self.scorer.embed_frames(frames)
        return {
            name: [ATTRIBUTES[name][i] for i in (images @ texts.T).argmax(1)] for name, texts in self.phrases.items()
        }

    def shares(self, frames: np.ndarray, scenes: Sequence[Scene]) -> dict[str, float]:
        """Share of the frames, each of its own scene, in which an attribute is named as the scene has it."""
        return {
            name: float(np.mean([value == getattr(s, name) for value, s in zip(values, scenes, strict=True)]))
            for name, values in self.named(frames).items()
        }

    def verdict(self, frames: np.ndarray, source: Scene, truth: Scene, times: Sequence[float]) -> Verdict:
        """Of the edited video ``frames`` (`f h w c` uint8, of any size), which shows ``times`` of the clip.

        Args:
            source: the clip's scene.
            truth: what the edit should come to; it must differ from the source in some attribute.
        """
        frames = np.stack([_resized(frame) for frame in frames])
        true_frames = np.stack([render(truth, time) for time in times])
        right = self.shares(frames, [truth] * len(frames))
        changed = [name for name in ATTRIBUTES if getattr(source, name) != getattr(truth, name)]
        error = np.square((frames.astype(np.float64) - true_frames) / 255).mean()
        consistency = frame_consistency(self.scorer.embed_frames(frames))
        return Verdict(
            track_error=float(np.mean([track_error(f, truth, t) for f, t in zip(frames, times, strict=True)])),
            attributes_edited=float(np.mean([right[name] for name in changed])),
            attributes_kept=float(np.mean([right[name] for name in ATTRIBUTES if name not in changed])),
            consistency_to_truth=consistency - frame_consistency(self.scorer.embed_frames(true_frames)),
            psnr_to_truth=float(-10 * np.log10(max(error, 1e-10))),
        )


def _resized(frame: np.ndarray) -> np.ndarray:
    """At the world's size."""
    if frame.shape[:2] == (SIDE, SIDE):
        return frame
    return np.asarray(Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
