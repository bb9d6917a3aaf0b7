"""Compare an edited video with its rendered ground truth: the object's track, and the attributes changed and kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from tav_model.metrics.clip import ClipScorer, frame_consistency
from toyworld.backdrops import SIDE
from toyworld.captions import phrase
from toyworld.identity import identity_error
from toyworld.renderer import render
from toyworld.scenes import ATTRIBUTES, Scene
from toyworld.truth import look, shows_object, track_error

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Verdict:
    """The scores of one edited video against its ground truth; each is a mean over the frames.

    Attributes:
        track_error: distance of the object from its true position, as a share of the picture's width.
        attributes_edited: share of the edited attributes that the scorer recognizes in the frames.
        attributes_kept: share of the other attributes that the scorer recognizes unchanged.
        consistency_to_truth: frame consistency (arXiv 2212.11565) minus that of the true video.
        psnr_to_truth: peak signal-to-noise ratio to the true video, in decibels.
        identity_error: difference of the object's appearance between frames, divided by that of random patterns.
        frames_without_object: share of the frames that do not show an object.
    """

    track_error: float
    attributes_edited: float
    attributes_kept: float
    consistency_to_truth: float
    psnr_to_truth: float
    identity_error: float
    frames_without_object: float


class Judge:
    """Recognizes the attributes of pictures, and scores edited videos with that.

    The value of an attribute is the one whose phrase has the embedding closest to the picture's.

    Args:
        scorer: a CLIP model trained on pictures and captions of the world, such as `toyworld/scorer`.
    """

    def __init__(self, scorer: ClipScorer) -> None:
        self.scorer = scorer
        self.phrases = {
            name: scorer.embed_texts([phrase(name, value) for value in values]) for name, values in ATTRIBUTES.items()
        }

    def named(self, frames: np.ndarray) -> dict[str, list[str]]:
        """Return the recognized value of each attribute in each of the frames, `f h w c` in uint8."""
        images = self.scorer.embed_frames(frames)
        return {
            name: [ATTRIBUTES[name][i] for i in (images @ texts.T).argmax(1)] for name, texts in self.phrases.items()
        }

    def shares(self, frames: np.ndarray, scenes: Sequence[Scene]) -> dict[str, float]:
        """Return, by attribute, the share of frames in which it is recognized as in the scene of that frame."""
        return {
            name: float(np.mean([value == getattr(s, name) for value, s in zip(values, scenes, strict=True)]))
            for name, values in self.named(frames).items()
        }

    def verdict(self, frames: np.ndarray, source: Scene, truth: Scene, times: Sequence[float]) -> Verdict:
        """Score an edited video against the rendered ground truth.

        Args:
            frames: the edited video, `f h w c` in uint8, of any size.
            source: scene of the source clip.
            truth: scene of the ground truth. If it is the source, all attributes count as kept and none as edited.
            times: time of each frame, 0 to 1.
        """
        frames = np.stack([_resized(frame) for frame in frames])
        true_frames = np.stack([render(truth, time) for time in times])
        right = self.shares(frames, [truth] * len(frames))
        changed = [name for name in ATTRIBUTES if getattr(source, name) != getattr(truth, name)]
        error = np.square((frames.astype(np.float64) - true_frames) / 255).mean()
        regions = [look(frame).region for frame in frames]
        missing = [not shows_object(region, truth, time) for region, time in zip(regions, times, strict=True)]
        consistency = frame_consistency(self.scorer.embed_frames(frames))
        return Verdict(
            track_error=float(
                np.mean([track_error(region, truth, time) for region, time in zip(regions, times, strict=True)])
            ),
            attributes_edited=float(np.mean([right[name] for name in changed])) if changed else 1.0,
            attributes_kept=float(np.mean([right[name] for name in ATTRIBUTES if name not in changed] or [1.0])),
            consistency_to_truth=consistency - frame_consistency(self.scorer.embed_frames(true_frames)),
            psnr_to_truth=float(-10 * np.log10(max(error, 1e-10))),
            identity_error=identity_error(frames, truth, times),
            frames_without_object=float(np.mean(missing)),
        )


def _resized(frame: np.ndarray) -> np.ndarray:
    """Return a frame at the size of the world's pictures."""
    if frame.shape[:2] == (SIDE, SIDE):
        return frame
    return np.asarray(Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
