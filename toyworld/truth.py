"""What can be seen in a picture without any network: ground, sky, the object's colour, and where the object is."""

from __future__ import annotations

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from .backdrops import SIDE, backdrop
from .renderer import LIGHT, PAINT, render_with_mask
from .scenes import GROUNDS, SKIES, STYLES, Scene

# Rows that the object seldom reaches, from the top and from the bottom: sky, and the ground's near end.
SKY_ROWS, GROUND_ROWS = slice(0, 10), slice(SIDE - 14, SIDE)
# Colours further apart than this (Euclidean, of 0 to 255) are not the landscape's.
FOREIGN = 45.0
# A smaller region than this many pixels is no object.
SMALLEST = 60
COLUMN_STEP = 4


@dataclass(frozen=True)
class Seen:
    """What a picture shows; ``colour`` is None where there is no object, and ``region`` is then empty.

    Attributes:
        region: which pixels are the object's, (128, 128) bool.
    """

    ground: str
    sky: str
    colour: str | None
    region: np.ndarray


def look(picture: np.ndarray) -> Seen:
    """Read a picture, (128, 128, 3) uint8, by the palette of the world: what is rendered serves as reference."""
    ground, sky, style = _landscape_of(picture)
    region = _foreign_region(picture, ground, sky, style)
    return Seen(ground, sky, _colour_of(picture[region], sky), region)


def track_error(picture: np.ndarray, truth: Scene, time: float) -> float:
    """How far the object is from where it is in the true picture, as a share of the picture's width.

    The object's pixels are those that are not the landscape's; where the true object's mask fits them best (by
    normalised correlation) is where the object is. A picture without an object counts as 0.5.
    """
    import cv2

    region = look(picture).region
    if not region.any():
        return 0.5
    _, mask = render_with_mask(truth, time)
    pose = truth.pose(time)
    reach = int(1.2 * pose.radius * SIDE) + 2
    x, y = round(pose.x * SIDE), round(pose.y * SIDE)
    padded = np.pad(mask, 2 * reach)
    template = padded[y + reach : y + 3 * reach + 1, x + reach : x + 3 * reach + 1]
    field = np.pad(region.astype(np.float32), 2 * reach)
    fit = cv2.matchTemplate(field, np.ascontiguousarray(template, np.float32), cv2.TM_CCOEFF_NORMED)
    best_y, best_x = np.unravel_index(np.nanargmax(fit), fit.shape)
    # A template's place names its corner, `reach` before the object's centre.
    return float(np.hypot(best_x - reach - x, best_y - reach - y) / SIDE)


@functools.cache
def _landscapes() -> tuple[list[tuple[str, str, str]], np.ndarray, np.ndarray]:
    """Every ground, sky and style, with the colours of its top and bottom rows: (n, 2, 3), and of all rows."""
    names = list(itertools.product(GROUNDS, SKIES, STYLES))
    with ThreadPoolExecutor() as pool:  # They take seconds, and numpy leaves other threads their turn.
        list(pool.map(lambda name: backdrop(*name), names))
    ends = [[np.median(backdrop(*n)[rows], axis=(0, 1)) for rows in (SKY_ROWS, GROUND_ROWS)] for n in names]
    return names, 255 * np.array(ends), np.array([255 * backdrop(*n)[:, ::COLUMN_STEP] for n in names])


def _landscape_of(picture: np.ndarray) -> tuple[str, str, str]:
    names, ends, rows = _landscapes()
    seen = np.array([np.median(picture[rows], axis=(0, 1)) for rows in (SKY_ROWS, GROUND_ROWS)])
    away = np.abs(ends - seen).sum((1, 2))
    # Ground and sky by the ends; the style by which landscape explains most of the picture.
    ground, sky, _ = names[int(away.argmin())]
    fits = {}
    for style in STYLES:
        distances = _from_landscape(picture, rows[names.index((ground, sky, style))])
        fits[style] = np.minimum(distances, FOREIGN).mean()
    return ground, sky, min(fits, key=fits.__getitem__)


def _from_landscape(picture: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Each pixel's distance to the nearest colour of the landscape in its row and those beside it: (128, 128)."""
    padded = np.pad(rows, ((2, 2), (0, 0), (0, 0)), mode="edge")
    near = np.concatenate([padded[i : i + SIDE] for i in (0, 2, 4)], axis=1)  # h n c
    pixels = picture.astype(np.float32)
    squares = (
        np.square(pixels).sum(-1)[:, :, None]
        - 2 * np.einsum("hwc,hnc->hwn", pixels, near.astype(np.float32), optimize=True)
        + np.square(near).sum(-1)[:, None, :]
    )
    return np.sqrt(np.maximum(squares.min(-1), 0))


def _foreign_region(picture: np.ndarray, ground: str, sky: str, style: str) -> np.ndarray:
    """The largest connected region that is not the landscape's; empty if there is none of some size."""
    import cv2

    names, _, rows = _landscapes()
    distances = _from_landscape(picture, rows[names.index((ground, sky, style))])
    # A shadow is the ground's colour, darkened: it counts as ground.
    shadow = _from_landscape(picture, 0.68 * rows[names.index((ground, sky, style))])
    lower = np.arange(SIDE)[:, None] > 0.7 * SIDE
    distances = np.where(lower, np.minimum(distances, 1.5 * shadow), distances)
    foreign = cv2.morphologyEx((distances > FOREIGN).astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    count, labels, stats, _ = cv2.connectedComponentsWithStats(foreign, connectivity=8)
    if count < 2:
        return np.zeros((SIDE, SIDE), bool)
    largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    if stats[largest, cv2.CC_STAT_AREA] < SMALLEST:
        return np.zeros((SIDE, SIDE), bool)
    return labels == largest


def _colour_of(pixels: np.ndarray, sky: str) -> str | None:
    """The palette's colour that most pixels, (n, 3), are shades of: its direction is nearest, darkness left out."""
    if not len(pixels):
        return None
    shades = []
    for paint in PAINT.values():
        body = 255 * np.array(paint) * np.array(LIGHT[sky])
        light = body + 0.42 * (255 * np.array(LIGHT[sky]) - body)
        shades.append([body, 0.72 * body, 1.12 * body, light])
    values = pixels.astype(np.float64)
    chroma = values.max(-1) - values.min(-1)
    values = values[chroma > 40]  # wheels, windows, wood and outlines are grey
    if not len(values):
        return None
    away = np.sqrt(np.square(values[:, None, None] - np.array(shades)[None]).sum(-1)).min(-1)
    return tuple(PAINT)[int(np.bincount(away.argmin(-1), minlength=len(PAINT)).argmax())]
