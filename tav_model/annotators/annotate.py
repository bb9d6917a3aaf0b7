"""`annotate`: the condition frames of a clip, by the name of the annotator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tav_model.errors import TavError

# Computed by OpenCV, and by a model.
WITHOUT_MODEL, WITH_MODEL = ("canny", "lineart"), ("depth", "pose", "segmentation")
ANNOTATORS = (*WITHOUT_MODEL, *WITH_MODEL)


def annotate(
    kind: str,
    frames: np.ndarray,
    model: str | Path | None = None,
    detector: str | Path | None = None,
    device: str = "cpu",
    chunk_size: int = 8,
    on_chunk: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Return the condition frames of a clip, `f h w 3` in uint8.

    Args:
        kind: one of `ANNOTATORS`.
        frames: `f h w 3` in uint8.
        model: folder or hub id of the model, for the kinds that need one.
        detector: folder or hub id of the model that finds people, for `pose`; see there.
        device: where the models run.
        chunk_size: frames that they see at a time.
        on_chunk: called after each chunk with its number of frames.

    Raises:
        TavError: an unknown kind, or a model that is missing, not needed, or cannot be used.
        ValueError: frames of another shape or type.
    """
    if kind not in ANNOTATORS:
        raise TavError(f"control: {kind!r} must be one of {', '.join(ANNOTATORS)}")
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(f"frames: {frames.dtype} {frames.shape} must be uint8, f h w 3")
    if kind in WITHOUT_MODEL:
        if model is not None:
            raise TavError(f"control: {kind} needs no annotator model, but {model} is given")
        from tav_model.annotators import edges

        conditions: np.ndarray = getattr(edges, kind)(frames)
        if on_chunk is not None:
            on_chunk(len(frames))
        return conditions
    if model is None:
        raise TavError(f"control: {kind} needs the folder or hub id of an annotator model")
    from tav_model.annotators import networks

    if kind == "pose":
        return networks.pose(frames, model, detector, device, chunk_size, on_chunk)
    estimate = networks.depth if kind == "depth" else networks.segmentation
    return estimate(frames, model, device, chunk_size, on_chunk)
