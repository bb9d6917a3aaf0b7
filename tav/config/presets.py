"""Presets of what an edit takes over from the source, named after what is edited or after the method that does it."""

from __future__ import annotations

from dataclasses import dataclass

BY_CATEGORY = "category"
WORDS = "words"
"""The value of `mask` that derives it from the words that differ between the caption and the prompt."""
DIFFERENCE = "difference"
"""The value of `mask` that derives it from the predictions that differ between the caption and the prompt."""
NO_MASK = "none"
"""The value of `mask` that turns a preset's mask off."""
NOT_FILES = (WORDS, DIFFERENCE, NO_MASK)
"""The values of `mask` that are not the path of a mask of pixels."""


@dataclass(frozen=True)
class Preset:
    """What an edit takes over from the source; shares are of the sampling steps, from the first.

    Attributes:
        description: one sentence for the documentation.
        cross_replace: share in which words that the caption has too keep the source's attention.
        self_replace: share in which spatio-temporal and temporal attention are the source's.
        self_replace_layers: "upper" or "all", see `tav_model.attention_control`.
        residual_replace: share in which the features of an upper residual block are the source's.
        source_negative: share in which the caption takes the place of the negative prompt.
        source_negative_weight: weight of the caption's embedding there; the rest is the negative prompt's.
        attention_propagation: share in which the outputs of spatio-temporal attention are averaged along the source's motion,
            see `tav_model.propagation`.
        feature_propagation: the same for the outputs of complete transformer blocks.
        mean_match: share by which the first latents have the mean of noised latents, see
            `tav_model.trajectory.Trajectory.start`.
        deviation_match: the same for their deviation.
        strength: share of the steps that are sampled, the last ones; the clip's latents take the place of what the others
            would lead to.
        fresh_noise: share of fresh noise in the first latents, within a mask that is not one of words; see
            `tav_model.fresh_noise`.
        guidance_end: share after which the prompt is no longer guided, see `tav_model.guidance.guided_steps`.
        mask: "words" or "difference", or None for no mask.
        mask_start: share after which the mask applies; None: the default of the kind of mask.
        mask_end: share after which it does not apply any more.
    """

    description: str
    cross_replace: float = 0.0
    self_replace: float = 0.0
    self_replace_layers: str = "all"
    residual_replace: float = 0.0
    source_negative: float = 0.0
    source_negative_weight: float = 1.0
    attention_propagation: float = 0.0
    feature_propagation: float = 0.0
    mean_match: float = 0.0
    deviation_match: float = 0.0
    strength: float = 1.0
    fresh_noise: float = 0.0
    guidance_end: float = 1.0
    mask: str | None = None
    mask_start: float | None = None
    mask_end: float = 1.0


PRESETS = {
    "tune-a-video": Preset("nothing but the first latents, as in Tune-A-Video"),
    "layout": Preset(
        "the layout, as far as the first latents have it; guidance leads away from the caption at first (as in "
        "negative-prompt inversion, arXiv 2305.16807)",
        source_negative=0.7,
        source_negative_weight=0.5,
        attention_propagation=1.0,
        feature_propagation=0.5,
        mean_match=1.0,
        deviation_match=0.25,
    ),
    "style": Preset(
        "another style of the complete picture; shapes stay",
        cross_replace=0.2,
        source_negative=0.4,
        attention_propagation=1.0,
        strength=0.9,
    ),
    "attribute": Preset(
        "another colour or material of an object; its shape and everything else stay",
        cross_replace=0.7,
        self_replace=0.7,
        strength=0.8,
        guidance_end=0.6,
        mask=DIFFERENCE,
    ),
    "object": Preset(
        "another object in the place of one; its surroundings stay",
        cross_replace=0.2,
        source_negative=0.8,
        source_negative_weight=0.5,
        attention_propagation=1.0,
        feature_propagation=0.4,
        mean_match=1.0,
        deviation_match=0.25,
        strength=0.8,
        fresh_noise=0.5,
        guidance_end=0.7,
        mask=DIFFERENCE,
    ),
    "background": Preset(
        "other surroundings; objects stay",
        source_negative=0.7,
        source_negative_weight=0.5,
        attention_propagation=1.0,
        mean_match=1.0,
        deviation_match=0.25,
        mask=DIFFERENCE,
    ),
    "fatezero": Preset(
        "FateZero (arXiv 2303.09535): attention of all layers, blending by words from 0.2 to 0.8 of the steps; without "
        "its blending of the attention maps themselves",
        cross_replace=0.8,
        self_replace=0.8,
        mask=WORDS,
        mask_start=0.2,
        mask_end=0.8,
    ),
    "video-p2p": Preset(
        "Video-P2P (arXiv 2303.04761): attention to words, blending by words to the last step; the source comes from the "
        "trajectory in place of null-text optimisation",
        cross_replace=0.8,
        self_replace=0.6,
        mask=WORDS,
        mask_start=0.2,
    ),
    "plug-and-play": Preset(
        "Plug-and-Play (arXiv 2211.12572): attention and features of the upper layers",
        self_replace=0.5,
        self_replace_layers="upper",
        residual_replace=0.8,
    ),
}
"""The presets by name."""

_OF_CATEGORY = {
    "style": "style",
    "object": "object",
    "background": "background",
    "colour": "attribute",
}
_OTHERWISE = "layout"


def preset_of(name: str, category: str | None) -> str:
    """Return the name of a preset; `category` stands for that of the row's category.

    Rows of several changes, or without a category, keep the layout alone: what else would stay is not known.
    """
    return _OF_CATEGORY.get(category or "", _OTHERWISE) if name == BY_CATEGORY else name
