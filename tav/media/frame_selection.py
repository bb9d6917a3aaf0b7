"""Select frames of a clip, and fit them to the size that the parameters set."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tav_model.errors import TavError
from tav_model.video import evenly_spaced

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from tav.config import DecodeParams


def select_frames(decode: DecodeParams, available: int) -> list[int]:
    """Return the indexes of the frames that the section `decode` selects out of `available` frames.

    Raises:
        TavError: the clip has too few frames.
    """
    end = available if decode.end is None else min(decode.end, available)
    span = end - decode.start
    if decode.frames == "all":
        if span < 1:
            raise TavError(f"has {available} frames, none of them from decode.start {decode.start}; start earlier")
        return list(range(decode.start, end, decode.stride if decode.sampling == "stride" else 1))
    needed = decode.frames if decode.sampling == "uniform" else (decode.frames - 1) * decode.stride + 1
    if span < needed:
        part = f", {max(span, 0)} of them from decode.start {decode.start}" if decode.start or end < available else ""
        way_out = "ask for fewer" if span > 0 else "start earlier"
        raise TavError(
            f"has {available} frames{part}, but {needed} are needed for decode.frames {decode.frames}"
            f"{f' at decode.stride {decode.stride}' if decode.sampling == 'stride' else ''}; {way_out}"
        )
    if decode.sampling == "stride":
        return [decode.start + i * decode.stride for i in range(decode.frames)]
    return [decode.start + index for index in evenly_spaced(span, decode.frames)]


def fit_image(image: Image.Image, decode: DecodeParams) -> np.ndarray:
    """Return an image at the size of the section `decode`, cropped, padded or stretched: `height width 3` in uint8."""
    import numpy as np
    from PIL import Image, ImageOps

    image, size = image.convert("RGB"), (decode.width, decode.height)
    if decode.fit == "crop":
        image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    elif decode.fit == "pad":
        image = ImageOps.pad(image, size, Image.Resampling.LANCZOS, color="black")
    else:
        image = image.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(image)
