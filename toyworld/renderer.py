"""Render pictures of a scene at any time, 128x128; equal scenes result in bit-identical pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from toyworld.backdrops import BLOCK, SIDE, backdrop
from toyworld.patterns import accent_share
from toyworld.scenes import GROUND_LINE, HORIZON, Pose, Scene
from toyworld.shapes import SHAPES

# Objects are drawn at this multiple of their size and averaged down, which smooths their edges.
OVERSAMPLING = 4

PAINT = {
    "red": (0.86, 0.13, 0.15),
    "orange": (0.95, 0.50, 0.08),
    "yellow": (0.98, 0.84, 0.12),
    "green": (0.08, 0.58, 0.24),
    "blue": (0.13, 0.30, 0.86),
    "purple": (0.50, 0.18, 0.72),
    "pink": (0.97, 0.44, 0.72),
}
# Colours of parts that do not depend on the object's colour.
FIXED = {
    "glass": (0.80, 0.92, 0.98),
    "tyre": (0.13, 0.13, 0.16),
    "metal": (0.80, 0.82, 0.85),
    "lamp": (1.0, 0.95, 0.70),
    "wood": (0.45, 0.30, 0.18),
    "sail": (0.97, 0.96, 0.92),
    "flame": (1.0, 0.72, 0.20),
    "white": (1.0, 1.0, 1.0),
}
# Accents of a pattern, as functions of the object's colour.
ACCENT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "white": lambda body: np.array((0.96, 0.96, 0.94)),
    "black": lambda body: np.array((0.12, 0.12, 0.14)),
    "pale": lambda body: body + 0.5 * (1 - body),
    "deep": lambda body: 0.5 * body,
}
LIGHT = {"day": (1.0, 1.0, 1.0), "sunset": (1.0, 0.90, 0.84), "night": (0.82, 0.84, 0.94)}
OUTLINE_WIDTH = 3.2  # Pixels.
OUTLINE = (0.10, 0.08, 0.12)


def render(scene: Scene, time: float) -> np.ndarray:
    """Return the picture at a time from 0 to 1 as (128, 128, 3) uint8 RGB."""
    return render_with_mask(scene, time)[0]


def render_clip(scene: Scene, frames: int) -> np.ndarray:
    """Return pictures evenly spaced from time 0 to 1, `f h w c` in uint8."""
    return np.stack([render(scene, time) for time in times(frames)])


def times(frames: int) -> np.ndarray:
    """Return the times of a clip's frames, evenly spaced from 0 to 1, with shape (frames,)."""
    return np.linspace(0, 1, frames)


def render_with_mask(scene: Scene, time: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the picture at a time, and the share of each pixel that the object covers: (128, 128) float32, 0 to 1."""
    picture = empty_picture(scene, time)
    pose = scene.pose(time)
    picture = _with_shadow(picture, pose, scene)
    colours, cover, corner = _object_patch(scene, pose)
    mask = np.zeros((SIDE, SIDE), np.float32)
    # The part of the patch that is inside the picture.
    left, top = corner
    right, bottom = min(SIDE, left + cover.shape[1]), min(SIDE, top + cover.shape[0])
    x, y = max(0, left), max(0, top)
    if x < right and y < bottom:
        inner = (slice(y - top, bottom - top), slice(x - left, right - left))
        mask[y:bottom, x:right] = cover[inner]
        below = picture[y:bottom, x:right]
        picture[y:bottom, x:right] = below + cover[inner][..., None] * (colours[inner] - below)
    return np.rint(255 * picture.clip(0, 1)).astype(np.uint8), mask


def empty_picture(scene: Scene, time: float = 0.0) -> np.ndarray:
    """Return the landscape without the object as (128, 128, 3) float32, 0 to 1; a copy that may be changed."""
    panorama = backdrop(scene.ground, scene.sky, scene.style)
    # The camera moves in steps of a pixel; pixel art keeps its grid.
    step = BLOCK if scene.style == "pixel art" else 1
    left = round(scene.view * SIDE / BLOCK) * BLOCK + round(scene.pan * time * SIDE / step) * step
    return panorama.take(np.arange(left, left + SIDE), axis=1, mode="wrap")


def _with_shadow(picture: np.ndarray, pose: Pose, scene: Scene) -> np.ndarray:
    height = max(0.0, GROUND_LINE - pose.radius - pose.y)
    wide = pose.radius * (0.95 + 0.3 * height)
    if scene.style == "pixel art":
        grid = SIDE // BLOCK
        strength = _shadow(grid, pose.x, wide, 0.4 - 0.25 * height, True).repeat(BLOCK, 0).repeat(BLOCK, 1)
    else:
        strength = _shadow(SIDE, pose.x, wide, 0.4 - 0.25 * height, scene.style == "cartoon")
    top = SIDE - len(strength)
    picture[top:] *= 1 - strength[..., None]
    return picture


def _shadow(side: int, x: float, wide: float, strength: float, hard: bool) -> np.ndarray:
    """Return how much the shadow darkens the rows below the horizon, with shape (rows, side)."""
    top = int(HORIZON * SIDE) // BLOCK * side // (SIDE // BLOCK)
    rows = ((np.arange(top, side, dtype=np.float32) + 0.5) / side - GROUND_LINE) / (0.24 * wide)
    columns = ((np.arange(side, dtype=np.float32) + 0.5) / side - x) / wide
    away = np.sqrt(rows[:, None] ** 2 + columns[None] ** 2)
    return strength * ((away < 1).astype(np.float32) if hard else (1.35 - away).clip(0, 0.7) / 0.7)


def _object_patch(scene: Scene, pose: Pose) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Return a patch with the object: colours, the share of each pixel that it covers, and its upper left corner (x, y)."""
    pixels = scene.style == "pixel art"
    # Pixel art is drawn on a coarse grid, without smoothing.
    scale = SIDE // BLOCK if pixels else SIDE
    oversampling = 1 if pixels else OVERSAMPLING
    reach = int(1.25 * pose.radius * scale) + 2
    left, top = int(pose.x * scale) - reach, int(pose.y * scale) - reach
    size = 2 * reach + 1

    cos, sin = np.cos(pose.rotation), np.sin(pose.rotation)
    turn = pose.radius * scale * oversampling * np.array(((cos, sin), (-sin, cos)))
    centre = (np.array((pose.x, pose.y)) * scale - (left, top)) * oversampling
    # Pillow's coordinates refer to the centre of a pixel, not to its corner.
    outlines = [part.points @ turn + centre - 0.5 for part in SHAPES[scene.object]]

    def drawn(accent: str | None) -> np.ndarray:
        canvas = Image.new("RGBA", (size * oversampling, size * oversampling), (0, 0, 0, 0))
        draw = ImageDraw.Draw(canvas)
        if scene.style == "cartoon":
            width = round(OUTLINE_WIDTH * oversampling)
            for points in outlines:
                draw.line([*map(tuple, points), tuple(points[0]), tuple(points[1])], OUTLINE_FILL, width, "curve")
        for points, part in zip(outlines, SHAPES[scene.object], strict=True):
            draw.polygon([*map(tuple, points)], _fill(part.paint, scene.colour, scene.sky, accent))
        return np.asarray(canvas.reduce(oversampling) if oversampling > 1 else canvas, np.float32) / 255

    patch = drawn(None)
    colours, cover = patch[..., :3], patch[..., 3]
    if scene.pattern != "none":
        steps = np.arange(size, dtype=np.float32) + 0.5
        x, y = (steps + left) / scale - pose.x, (steps + top)[:, None] / scale - pose.y
        # Into the object's own coordinates, in which its radius is 1 and it is upright.
        u, v = (x * cos + y * sin) / pose.radius, (y * cos - x * sin) / pose.radius
        pixel = 1 / (pose.radius * scale)
        share = accent_share(scene.pattern, scene.phase, scene.slant, u, v, 1e-6 if pixels else pixel)
        colours = colours + share[..., None] * (drawn(scene.accent)[..., :3] - colours)
    if pixels:
        colours, cover = (array.repeat(BLOCK, 0).repeat(BLOCK, 1) for array in (colours, cover))
        return colours, cover, (left * BLOCK, top * BLOCK)
    if scene.style == "plain":
        colours = _shaded(colours, scene, pose, left, top)
    return colours, cover, (left, top)


def _shaded(colours: np.ndarray, scene: Scene, pose: Pose, left: int, top: int) -> np.ndarray:
    """Return the colours of a patch, lit from the upper right, where the sun and the moon are."""
    size = len(colours)
    steps = np.arange(size, dtype=np.float32) + 0.5
    x = ((steps + left) / SIDE - pose.x) / pose.radius
    y = ((steps + top) / SIDE - pose.y) / pose.radius
    lit = 1.02 + 0.10 * x[None] - 0.17 * y[:, None]
    colours = colours * lit[..., None]
    if scene.object == "ball":
        away = (x[None] - 0.38) ** 2 + (y[:, None] + 0.42) ** 2
        colours = colours + 0.5 * np.exp(-away / 0.045)[..., None]
    return colours


@functools.cache
def _fill(paint: str, colour: str, sky: str, accent: str | None) -> tuple[int, int, int, int]:
    """Return the RGBA of a part; with an accent, that of its accented places."""
    body = np.array(PAINT[colour])
    if accent is not None:
        body = ACCENT[accent](body)
    own = {"body": body, "dark": 0.68 * body, "light": body + 0.42 * (1 - body)}
    lit = own.get(paint, np.array(FIXED.get(paint, (0, 0, 0)))) * np.array(LIGHT[sky])
    red, green, blue = (round(255 * value) for value in lit.clip(0, 1))
    return red, green, blue, 255


OUTLINE_FILL = (*(round(255 * value) for value in OUTLINE), 255)
