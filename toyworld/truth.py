"""Read ground, sky, and the object's colour and position off a picture, without any network."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np

from toyworld.backdrops import SIDE, backdrop
from toyworld.renderer import LIGHT, PAINT, render_with_mask
from toyworld.scenes import GROUNDS, SKIES, STYLES, Scene

# Rows that the object rarely covers: the sky at the top, and the ground at the bottom.
SKY_ROWS, GROUND_ROWS = slice(0, 10), slice(SIDE - 14, SIDE)
# A pixel further than this from the landscape's colours (Euclidean, 0 to 255) does not belong to the landscape.
FOREIGN = 45.0
# A region with fewer pixels is not an object.
SMALLEST = 60
COLUMN_STEP = 4
# Width of the gaps, in pixels, that a pattern may tear into an object.
GAP = 9


@dataclass(frozen=True)
class Seen:
    """What a picture shows.

    Attributes:
        ground: the nearest of the world's grounds.
        sky: the nearest of the world's skies.
        style: that of the landscape which explains most of the picture.
        colour: colour of the object, or None if there is no object.
        region: the pixels of the object, (128, 128) bool; all False if there is no object.
    """

    ground: str
    sky: str
    style: str
    colour: str | None
    region: np.ndarray


def look(picture: np.ndarray) -> Seen:
    """Return what a picture, (128, 128, 3) in uint8, shows, by comparison with the rendered landscapes and colours."""
    ground, sky, style, rows, distances = _landscape_of(picture)
    region = _foreign_region(picture, rows, distances)
    return Seen(ground, sky, style, _colour_of(picture[region], sky), region)


def track_error(region: np.ndarray, truth: Scene, time: float) -> float:
    """Return the distance of the object from its true position, as a share of the picture's width.

    The object is where the true object's mask fits its pixels best, by normalized correlation. A picture without an object
    counts as 0.5.

    Args:
        region: the object's pixels as `look` returns them, (128, 128) bool.
        truth: scene of the ground truth.
        time: time of the picture, 0 to 1.
    """
    import cv2

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
    # The match is the corner of the template, `reach` before the object's centre.
    return float(np.hypot(best_x - reach - x, best_y - reach - y) / SIDE)


def shows_object(region: np.ndarray, truth: Scene, time: float) -> bool:
    """Return whether a picture shows an object with at least a quarter of the true object's visible area, anywhere.

    Args:
        region: the object's pixels as `look` returns them, (128, 128) bool.
        truth: scene of the ground truth.
        time: time of the picture, 0 to 1.
    """
    _, mask = render_with_mask(truth, time)
    return bool(region.sum() >= max(1.0, 0.25 * mask.sum()))


@functools.cache
def _landscapes() -> tuple[list[tuple[str, str, str]], np.ndarray, np.ndarray]:
    """Return every (ground, sky, style), the colours of its top and bottom rows as (n, 2, 3), and of all rows."""
    names = list(itertools.product(GROUNDS, SKIES, STYLES))
    ends = [[np.median(backdrop(*n)[rows], axis=(0, 1)) for rows in (SKY_ROWS, GROUND_ROWS)] for n in names]
    return names, 255 * np.array(ends), np.array([255 * backdrop(*n)[:, ::COLUMN_STEP] for n in names])


def _landscape_of(picture: np.ndarray) -> tuple[str, str, str, np.ndarray, np.ndarray]:
    """Return ground, sky and style of the landscape that a picture shows, its rows, and each pixel's distance from them."""
    names, ends, rows = _landscapes()
    seen = np.array([np.median(picture[rows], axis=(0, 1)) for rows in (SKY_ROWS, GROUND_ROWS)])
    away = np.abs(ends - seen).sum((1, 2))
    # The ends determine ground and sky; the style is the one whose landscape explains most of the picture.
    ground, sky, _ = names[int(away.argmin())]
    landscapes = [rows[names.index((ground, sky, style))] for style in STYLES]
    distances = [_from_landscape(picture, landscape) for landscape in landscapes]
    best = int(np.argmin([np.minimum(values, FOREIGN).mean() for values in distances]))
    return ground, sky, STYLES[best], landscapes[best], distances[best]


def _from_landscape(picture: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the distance of each pixel to the nearest colour of the landscape in nearby rows, as (128, 128)."""
    padded = np.pad(rows, ((2, 2), (0, 0), (0, 0)), mode="edge")
    near = np.concatenate([padded[i : i + SIDE] for i in (0, 2, 4)], axis=1)  # h n c
    pixels = picture.astype(np.float32)
    squares = pixels @ near.swapaxes(1, 2)  # h w n, in place from here on: most of the time goes into moving it
    squares *= -2
    squares += np.square(pixels).sum(-1)[:, :, None]
    squares += np.square(near).sum(-1)[:, None, :]
    return np.sqrt(np.maximum(squares.min(-1), 0))


def _foreign_region(picture: np.ndarray, rows: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """Return the largest connected region that does not belong to the landscape, all False if it is too small.

    Args:
        picture: the picture.
        rows: the landscape's.
        distances: of the pixels from the landscape, as `_from_landscape` returns them.
    """
    import cv2

    # A shadow has the darkened colour of the ground, and counts as ground.
    shadow = _from_landscape(picture, 0.68 * rows)
    lower = np.arange(SIDE)[:, None] > 0.7 * SIDE
    distances = np.where(lower, np.minimum(distances, 1.5 * shadow), distances)
    foreign = cv2.morphologyEx((distances > FOREIGN).astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    # Joins the parts of an object between which its pattern has the colours of the landscape.
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (GAP, GAP))
    joined = cv2.morphologyEx(np.pad(foreign, GAP), cv2.MORPH_CLOSE, disc)[GAP:-GAP, GAP:-GAP]
    count, labels, stats, _ = cv2.connectedComponentsWithStats(joined, connectivity=8)
    if count < 2:
        return np.zeros((SIDE, SIDE), bool)
    largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    if stats[largest, cv2.CC_STAT_AREA] < SMALLEST:
        return np.zeros((SIDE, SIDE), bool)
    region = (foreign > 0) & (labels == largest)
    outlines, _ = cv2.findContours(region.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = np.zeros((SIDE, SIDE), np.uint8)
    cv2.drawContours(filled, outlines, -1, 1, cv2.FILLED)
    return filled > 0


def _colour_of(pixels: np.ndarray, sky: str) -> str | None:
    """Return the colour of the palette whose shades are the nearest to most of the pixels, (n, 3)."""
    if not len(pixels):
        return None
    shades = []
    for paint in PAINT.values():
        body = 255 * np.array(paint) * np.array(LIGHT[sky])
        light = body + 0.42 * (255 * np.array(LIGHT[sky]) - body)
        shades.append([1.12 * body, body, 0.72 * body, 0.5 * body, 0.36 * body, light])
    values = pixels.astype(np.float64)
    chroma = values.max(-1) - values.min(-1)
    values = values[chroma > 40]  # Leaves out grey parts: wheels, windows, wood and outlines.
    if not len(values):
        return None
    away = np.sqrt(np.square(values[:, None, None] - np.array(shades)[None]).sum(-1)).min(-1)
    return tuple(PAINT)[int(np.bincount(away.argmin(-1), minlength=len(PAINT)).argmax())]
