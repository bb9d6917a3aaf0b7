"""Measure how well the outline of a generated object is drawn, wherever it is and however it is turned."""

from __future__ import annotations

import numpy as np

from toyworld.backdrops import SIDE
from toyworld.renderer import OUTLINE_WIDTH
from toyworld.scenes import Scene
from toyworld.shapes import SHAPES
from toyworld.truth import look

# Sizes relative to that of a shape with the region's area, and rotations in degrees: first a coarse search, then a finer
# one around its best three.
SIZES, TURNS = (0.88, 1.0, 1.12), range(0, 360, 15)
FINER_SIZES, FINER_TURNS = (0.94, 1.0, 1.06), (-8, -4, 0, 4, 8)
BEST = 3
FRACTION_BITS = 4  # of the coordinates that OpenCV draws polygons with


def silhouette(picture: np.ndarray, scene: Scene) -> float:
    """Return the intersection over union of the region of the object in a picture with the object's true shape.

    The shape is at the place, and has the size and the rotation, at which it fits best.

    Args:
        picture: (128, 128, 3) in uint8.
        scene: what the picture should show; its object and its style determine the shape.

    Returns:
        0 to 1; 0 if there is no object.
    """
    import cv2

    region = look(picture).region
    if not region.any():
        return 0.0
    name, outline = scene.object, round(OUTLINE_WIDTH) if scene.style == "cartoon" else 0
    radius = float(np.sqrt(region.sum() / _shape(name, SIDE / 4, 0.0, outline).sum()) * SIDE / 4)
    y, x = np.nonzero(region)
    margin = int(1.5 * radius) + 4
    window = np.pad(region, margin)[y.min() : y.max() + 2 * margin + 1, x.min() : x.max() + 2 * margin + 1]
    field = np.ascontiguousarray(window, np.float32)

    def fit(size: float, turn: float) -> float:
        shape = _shape(name, size, turn, outline)
        if shape.shape[0] > min(field.shape):
            return 0.0
        common = float(cv2.matchTemplate(field, shape, cv2.TM_CCORR).max())
        return common / (float(field.sum()) + float(shape.sum()) - common)

    coarse = [(fit(size * radius, turn), size * radius, turn) for size in SIZES for turn in TURNS]
    return max(
        fit(size * factor, turn + more)
        for _, size, turn in sorted(coarse, reverse=True)[:BEST]
        for factor in FINER_SIZES
        for more in FINER_TURNS
    )


def _shape(name: str, radius: float, turn: float, outline: int) -> np.ndarray:
    """Return the shape of an object with a radius in pixels, turned by some degrees, as (n, n) float32 of 0 and 1.

    The outline is a number of pixels, half of which are outside of the shape.
    """
    import cv2

    angle = np.radians(turn)
    matrix = radius * np.array(((np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))))
    reach = int(1.25 * radius) + 1 + outline
    canvas = np.zeros((2 * reach + 1, 2 * reach + 1), np.uint8)
    for part in SHAPES[name]:
        points = np.rint((part.points @ matrix + reach) * 2**FRACTION_BITS).astype(np.int32)
        cv2.fillPoly(canvas, [points], 1, shift=FRACTION_BITS)
        if outline:
            cv2.polylines(canvas, [points], True, 1, outline, shift=FRACTION_BITS)
    return canvas.astype(np.float32)
