"""What a row takes over from the source: from presets and parameters to the arguments of the pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.decode import AUDIO
from tav.config.paths import project_path
from tav.config.presets import DIFFERENCE, NO_MASK, NOT_FILES, PRESETS, WORDS, preset_of
from tav.config.results import MASK_IMAGE, read_record
from tav_model.digests import digest
from tav_model.errors import TavError
from tav_model.tensors import StoredTensor

if TYPE_CHECKING:
    import numpy as np

    from tav.config import DecodeParams, EditParams
    from tav.config.prompts import PromptRow

TRAJECTORY = "trajectory.safetensors"
# What is averaged along the clip's motion, see `tav_model.propagation`.
PROPAGATED = ("attention_propagation", "feature_propagation")
# Arguments of the pipeline that read the trajectory, and those that read the caption, whatever their values.
OF_THE_TRAJECTORY = ("cross_attention_kwargs", "mask", "strength", *PROPAGATED)
OF_THE_CAPTION = ("cross_attention_kwargs", "source_negative", *PROPAGATED)
# Part of the identity of rows whose mask is one of differences: change it when `tav_model.difference_mask` does.
DIFFERENCE_MASK_VERSION = "2"
# Arguments of the pipeline, and parameters, that change the first latents; see `tav_model.trajectory.Trajectory.start`.
MOMENTS = ("mean_match", "deviation_match")
OF_THE_FIRST_LATENTS = ("layout_strength", *MOMENTS)


@dataclass(frozen=True)
class Source:
    """The clip that edits take something over from.

    Attributes:
        root: the project, which masks are files of.
        inverted: the output of the stage `invert`.
        caption: what the clip shows.
        frames: the output of the stage `decode`; None where there is none, and no masks of pixels.
        decode: the section `decode` of the clip.
    """

    root: Path
    inverted: Path
    caption: str = ""
    frames: Path | None = None
    decode: DecodeParams | None = None

    def identity(self, arguments: dict[str, Any]) -> str:
        """Return a digest of everything of the source that a video with these arguments depends on."""
        parts: list[str | Path] = []
        if uses_trajectory(arguments):
            parts.append(self._present(self.inverted / TRAJECTORY))
        if uses_caption(arguments):
            parts.append(self.caption)
        if is_pixel_mask(arguments) and self.frames is not None and self.decode is not None:
            parts += [
                self._present(self.mask_path(arguments["mask"])),
                self._present(self.frames / "frames.safetensors"),
            ]
            parts.append(self.decode.model_dump_json())
        elif arguments.get("mask") == DIFFERENCE:
            parts.append(DIFFERENCE_MASK_VERSION)
            if self.frames is not None:
                parts.append(self._present(self.frames / "frames.safetensors"))
        return digest(*parts) if parts else ""

    @staticmethod
    def _present(path: Path) -> str | Path:
        """Return a path, or a text where nothing is there, so that the row fails when it is rendered."""
        return path if path.exists() else "missing"

    def mask_path(self, mask: str) -> Path:
        """Return the path of a mask in the project. Raises TavError where it leads out of it."""
        return project_path(self.root, mask, "mask")

    def trajectory(self) -> StoredTensor:
        """Return the inversion's trajectory, `n 1 c f h w`.

        Raises:
            TavError: the inversion is of an earlier version, which did not keep it.
        """
        path = self.inverted / TRAJECTORY
        if not path.exists():
            raise TavError(
                f"{path}: no such file; masks and presets need it: invert again (dvc repro -f, for the stage)"
            )
        return StoredTensor(path, "trajectory")

    def pixel_mask(self, mask: str) -> np.ndarray:
        """Return a mask of pixels, `f H W` bool.

        Raises:
            TavError: it cannot be read, or the frames are not there.
        """
        from tav.media.masks import load_mask

        if self.decode is None or self.frames is None:
            raise TavError(f"mask: {mask!r}: without the clip's frames, only {', '.join(NOT_FILES)} are allowed")
        # How many frames a clip of all has is known from those.
        number = len(self.source_frames()) if self.decode.frames == "all" else self.decode.frames
        return load_mask(self.mask_path(mask), self.decode.model_copy(update={"frames": number}))

    def kept_pixels(self, video: Path) -> np.ndarray | None:
        """Return the pixels that an edit left to the source, `f H W` bool, by its record; None without a mask of pixels."""
        import numpy as np

        from tav_model.blending import feathered

        record = read_record(video.with_suffix(".json"))
        mask = record.get("mask")
        if not mask or mask in NOT_FILES:
            return None
        generated = self.pixel_mask(mask)
        shape = generated.shape
        if not generated.strides[0]:
            generated = generated[:1]  # It is the same for all frames.
        generated = generated != record.get("mask_inverted", False)
        return np.broadcast_to(feathered(generated, record.get("mask_feather", 0.0)) == 0, shape)

    def source_frames(self) -> StoredTensor:
        """Return the clip's frames, `f H W 3` in uint8."""
        assert self.frames is not None  # noqa: S101 (`pixel_mask` has refused it)
        return StoredTensor(self.frames / "frames.safetensors", "frames")

    def audio(self) -> Path | None:
        """Return the file with the clip's sound; None where it has none, or is not used as a whole."""
        path = None if self.frames is None else self.frames / AUDIO
        return path if path is not None and path.exists() else None


def mask_image(mask: np.ndarray) -> str:
    """Return a mask, `h w` of 0 and 1, as a black and white PNG in a data: URI."""
    import base64
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray((mask > 0.5).astype("uint8") * 255).convert("1").save(stream, "PNG", optimize=True)
    return MASK_IMAGE + base64.b64encode(stream.getvalue()).decode()


def uses_trajectory(arguments: dict[str, Any]) -> bool:
    """Return whether something is read from the trajectory."""
    return any(name in arguments for name in (*OF_THE_TRAJECTORY, *OF_THE_FIRST_LATENTS))


def uses_caption(arguments: dict[str, Any]) -> bool:
    """Return whether the prompt is compared with the caption or guided away from it, or the source is looked at under it."""
    return arguments.get("mask") in (WORDS, DIFFERENCE) or any(name in arguments for name in OF_THE_CAPTION)


def is_pixel_mask(arguments: dict[str, Any]) -> bool:
    """Return whether there is a mask that is a file."""
    return arguments.get("mask", WORDS) not in NOT_FILES


def is_pasted(arguments: dict[str, Any]) -> bool:
    """Return whether what is outside of the mask is copied from the clip's frames."""
    return is_pixel_mask(arguments) or arguments.get("mask") == DIFFERENCE


def source_arguments(row: PromptRow, params: EditParams, category: str | None = None) -> tuple[str, dict[str, Any]]:
    """Return the name of the row's preset, and those arguments of the pipeline that depend on it and on the parameters.

    Where `category` chooses the preset, that of the row does, or else the one that is given here.

    Arguments that have no effect are left out: with Tune-A-Video's method, there are none. A mask is still a path, `words` or
    `difference`.
    """
    name = preset_of(row.preset or params.preset, row.category or category)
    preset = PRESETS[name]

    def chosen(name: str) -> float:
        value = getattr(params, name)
        return getattr(preset, name) if value is None else value

    control: dict[str, Any] = {}
    if cross := chosen("cross_replace"):
        control |= {"edit_type": "auto", "n_cross_replace": cross}
    if replaced := chosen("self_replace"):
        control |= {"n_self_replace": replaced, "self_replace_layers": preset.self_replace_layers}
    if preset.residual_replace:
        control["n_residual_replace"] = preset.residual_replace

    arguments: dict[str, Any] = {"cross_attention_kwargs": control} if control else {}
    mask = row.mask or params.mask or preset.mask
    if mask and mask != NO_MASK:
        arguments |= {"mask": mask, "mask_end": preset.mask_end}
        if preset.mask_start is not None:
            arguments["mask_start"] = preset.mask_start
        if params.mask_inverted:
            arguments["mask_inverted"] = True
        if mask == WORDS:
            arguments["mask_threshold"] = params.mask_threshold
        else:
            arguments["mask_feather"] = params.mask_feather
        if mask == DIFFERENCE:
            arguments["difference_threshold"] = params.difference_threshold
    if params.layout_strength is not None:
        arguments["layout_strength"] = params.layout_strength
    for moment in MOMENTS:
        if share := chosen(moment):
            arguments[moment] = share
    if (strength := chosen("strength")) < 1:
        arguments["strength"] = strength
    # A mask of words is not known in advance; without one, the layout would be lost everywhere.
    if is_pasted(arguments) and (fresh := chosen("fresh_noise")):
        arguments["fresh_noise"] = fresh
    if negative := chosen("source_negative"):
        arguments["source_negative"] = negative
        if (weight := chosen("source_negative_weight")) < 1:
            arguments["source_negative_weight"] = weight
    for propagated in PROPAGATED:
        share = getattr(params, propagated)
        # From noise, the motion may be another one: that of a control.
        if share is None and params.start == "inverted":
            share = getattr(preset, propagated)
        if share:
            arguments[propagated] = share
    if params.proximal_quantile is not None:
        arguments["proximal_quantile"] = params.proximal_quantile
    if params.sampler != "ddim":
        arguments["sampler"] = params.sampler
    if params.guidance_start > 0:
        arguments["guidance_start"] = params.guidance_start
    if (guidance_end := chosen("guidance_end")) < 1:
        arguments["guidance_end"] = guidance_end
    if params.feature_reuse_interval > 1:
        arguments["feature_reuse_interval"] = params.feature_reuse_interval
    return name, arguments
