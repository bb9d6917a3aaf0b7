"""The catalogue of scores: what each is called, what it means, and how it is written.

To add a score, compute it in `tav_model.metrics`, call it in `tasks.score`, and describe it here. Comparisons, reports,
benchmarks and the command line take its direction, label, explanation and format from this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A score of a video.

    Attributes:
        key: the name in metrics.json, scores.csv and MLflow.
        label: the name on pages.
        explanation: one or two sentences.
        higher_is_better: the direction in which the score improves.
        number_format: a format string for one number; shares are written as percentages.
    """

    key: str
    label: str
    explanation: str
    higher_is_better: bool
    number_format: str = "{:.3f}"

    def text(self, value: float) -> str:
        """Return the value as a page shows it, with a typographic minus sign."""
        return self.number_format.format(value).replace("-", "\N{MINUS SIGN}")


_CATALOGUE = (
    Metric(
        key="textual_alignment",
        label="textual alignment",
        explanation="How well the frames match the prompt: mean cosine similarity between their CLIP embeddings and the "
        "prompt's. The source is compared with its caption.",
        higher_is_better=True,
    ),
    Metric(
        key="alignment_gain",
        label="alignment gain",
        explanation="How much better the frames match the prompt than those of the source do. At 0 or below, the prompt "
        "does not show in the edit.",
        higher_is_better=True,
        number_format="{:+.3f}",
    ),
    Metric(
        key="frame_consistency",
        label="frame consistency",
        explanation="How similar the frames are: mean cosine similarity between the CLIP embeddings of all pairs of "
        "frames. Motion lowers it too, so compare it with the source's.",
        higher_is_better=True,
    ),
    Metric(
        key="consecutive_consistency",
        label="neighbour consistency",
        explanation="Frame consistency of neighbouring frames only.",
        higher_is_better=True,
    ),
    Metric(
        key="frame_accuracy",
        label="frame accuracy",
        explanation="Share of the frames that CLIP finds closer to the edit's prompt than to the source's caption.",
        higher_is_better=True,
        number_format="{:.0%}",
    ),
    Metric(
        key="pick_score",
        label="PickScore",
        explanation="How much people would prefer the frames, as predicted by a model trained on human choices.",
        higher_is_better=True,
        number_format="{:.2f}",
    ),
    Metric(
        key="attributes_edited",
        label="attributes edited",
        explanation="Share of the attributes to be edited (object, colour, place, style) that are recognised as intended.",
        higher_is_better=True,
        number_format="{:.0%}",
    ),
    Metric(
        key="attributes_kept",
        label="attributes kept",
        explanation="Share of the attributes not to be edited that are recognised as in the source.",
        higher_is_better=True,
        number_format="{:.0%}",
    ),
    Metric(
        key="consistency_to_truth",
        label="consistency to truth",
        explanation="Frame consistency minus that of the true video. Below 0, the edit changes more from frame to frame "
        "than it should.",
        higher_is_better=True,
        number_format="{:+.3f}",
    ),
    Metric(
        key="psnr_to_truth",
        label="PSNR to truth",
        explanation="Peak signal-to-noise ratio against the true video, in decibels.",
        higher_is_better=True,
        number_format="{:.1f} dB",
    ),
    Metric(
        key="identity_error",
        label="identity error",
        explanation="How much the object changes from frame to frame, relative to objects with random patterns: 0 is the "
        "same object throughout, 1 another one in each frame.",
        higher_is_better=False,
        number_format="{:.2f}",
    ),
    Metric(
        key="frames_without_object",
        label="frames without object",
        explanation="Share of the frames in which the object is missing.",
        higher_is_better=False,
        number_format="{:.0%}",
    ),
    Metric(
        key="track_error",
        label="track error",
        explanation="Distance of the object from its true position, as a share of the frame's width.",
        higher_is_better=False,
        number_format="{:.1%}",
    ),
    Metric(
        key="psnr_kept",
        label="PSNR of what stays",
        explanation="Peak signal-to-noise ratio to the source in the pixels that should stay: outside of the mask, or where "
        "the true video equals the source.",
        higher_is_better=True,
        number_format="{:.1f} dB",
    ),
    Metric(
        key="ssim_kept",
        label="SSIM of what stays",
        explanation="Structural similarity to the source in the pixels that should stay.",
        higher_is_better=True,
    ),
    Metric(
        key="motion_fidelity",
        label="motion fidelity",
        explanation="How well points of the edit move as points of the source do: 1 for the same directions, 0 for unrelated "
        "ones.",
        higher_is_better=True,
    ),
    Metric(
        key="warping_error",
        label="warping error",
        explanation="How much the appearance changes along the source's motion: mean squared difference of neighbouring "
        "frames, aligned by that motion.",
        higher_is_better=False,
        number_format="{:.4f}",
    ),
    Metric(
        key="flicker",
        label="flicker",
        explanation="Mean change of brightness from frame to frame. Motion adds to it, so compare it with the source's.",
        higher_is_better=False,
    ),
    Metric(
        key="excess_flicker",
        label="excess flicker",
        explanation="The edit's flicker minus the source's.",
        higher_is_better=False,
        number_format="{:+.3f}",
    ),
)

METRICS = {metric.key: metric for metric in _CATALOGUE}
"""Every score, by key, in the order of columns."""

HEADLINES = tuple(METRICS[key] for key in ("textual_alignment", "frame_consistency", "track_error", "warping_error"))
"""The scores to show first, where a video has them."""


INCONSISTENT = 0.05
"""How far an edit's frame consistency may be below the source's.

The motion is the same, so it should hardly differ. For toyworld, whose correct edits are known, it does so by 0.03 at most
(150 random edits, by `toyworld/scorer`), whereas two wrong frames of eight cost 0.16 (the median).
"""


def shortcomings(scores: Mapping[str, float], source: Mapping[str, float]) -> list[str]:
    """Return what the scores say is wrong with an edit, each in a clause; empty if they are as they should be.

    Args:
        scores: of the edit.
        source: of the source.
    """
    found = []
    if scores.get("alignment_gain", 1) <= 0:
        found.append(
            "the prompt does not show: the frames match it no better than the source's do; try a larger guidance_scale"
        )
    consistency, reference = scores.get("frame_consistency", 1), source.get("frame_consistency", 0)
    if consistency < reference - INCONSISTENT:
        found.append(f"the frames do not belong together: frame consistency {consistency:.2f}, source {reference:.2f}")
    return found


def headlines_text(scores: Mapping[str, float]) -> str:
    """Return the scores to show first in one line: `textual alignment 0.577, frame consistency 0.965`."""
    return ", ".join(
        f"{metric.label} {metric.text(scores[metric.key])}" for metric in HEADLINES if metric.key in scores
    )


def format_score(key: str, value: float) -> str:
    """Return a score as pages show it; one that is not in the catalogue, as those of other versions, with four digits."""
    return METRICS[key].text(value) if key in METRICS else f"{value:.4g}"
