"""Landscapes: a panorama for each ground, sky and style, two pictures wide, whose left and right ends join."""

from __future__ import annotations

import functools

import numpy as np

from toyworld.scenes import HORIZON

SIDE = 128
# Twice the width of a picture: a scene shows one window of the panorama.
WIDTH = 2 * SIDE
# Landscapes are drawn at this multiple of their size and averaged down, which smooths edges.
OVERSAMPLING = 3
# Side of a block of pixel art, in pixels.
BLOCK = 4
# Height above which there is only sky: the hills end 0.17 above the horizon.
HILLTOPS = HORIZON - 0.18

# Colours of the upper and lower end of the sky. All colours are RGB from 0 to 1.
SKY = {
    "day": ((0.38, 0.66, 0.94), (0.84, 0.93, 0.98)),
    "sunset": ((0.42, 0.33, 0.58), (1.00, 0.74, 0.52)),
    "night": ((0.04, 0.05, 0.16), (0.16, 0.19, 0.38)),
}
# Colours of the ground at the horizon and at the lower edge, by day.
GROUND = {
    "grass": ((0.62, 0.80, 0.42), (0.36, 0.62, 0.26)),
    "sand": ((0.96, 0.89, 0.70), (0.87, 0.75, 0.51)),
    "snow": ((0.97, 0.98, 1.00), (0.87, 0.92, 0.98)),
    "road": ((0.60, 0.61, 0.64), (0.42, 0.43, 0.47)),
    "sea": ((0.42, 0.72, 0.78), (0.12, 0.45, 0.60)),
}
HILL = {
    "grass": (0.40, 0.66, 0.48),
    "sand": (0.86, 0.76, 0.62),
    "snow": (0.76, 0.84, 0.93),
    "road": (0.55, 0.60, 0.62),
    "sea": (0.42, 0.62, 0.66),
}
# Factors by which the light of each time of day multiplies ground and hills.
LIGHT = {"day": (1.0, 1.0, 1.0), "sunset": (0.98, 0.78, 0.70), "night": (0.42, 0.48, 0.66)}


@functools.cache
def backdrop(ground: str, sky: str, style: str) -> np.ndarray:
    """Return the panorama as (SIDE, 2 SIDE, 3) float32, 0 to 1; it is cached and read-only."""
    if style != "pixel art":
        picture = _reduce(_landscape(ground, sky, style == "cartoon"), OVERSAMPLING)
    else:
        small = _reduce(backdrop(ground, sky, "plain"), BLOCK)
        small = np.rint(small * 12) / 12  # Few colours, like those of old computers.
        picture = small.repeat(BLOCK, 0).repeat(BLOCK, 1)
    picture.flags.writeable = False
    return picture


def _landscape(ground: str, sky: str, cartoon: bool) -> np.ndarray:
    x, y = _positions()
    picture = _sky(sky, cartoon).copy()
    light = np.array(LIGHT[sky], np.float32)
    # All below is hills and ground, whose edges are the more expensive part.
    below = slice(round(HILLTOPS * len(y)), None)
    x, y, lower = x[below], y[below], picture[below]
    for height, colour in zip(_ridges(x), (0.75, 1.0), strict=True):
        hill = (colour * np.array(HILL[ground], np.float32) + (1 - colour) * np.array(SKY[sky][1], np.float32)) * light
        # Over the sea, hills are low, like distant islands.
        low = 0.45 if ground == "sea" else 1.0
        ridge = HORIZON - height * low
        lower = _blend(lower, hill, _edge(y - ridge))
        if cartoon:
            lower = _blend(lower, hill * 0.45, _line(y - ridge, 0.006))
    near = ((y - HORIZON) / (1 - HORIZON)).clip(0, 1)
    land = _ground(x, near, ground, cartoon) * light
    lower = _blend(lower, land, _edge(y - HORIZON))
    if cartoon:
        lower = _blend(lower, np.array(GROUND[ground][1], np.float32) * light * 0.45, _line(y - HORIZON, 0.006))
    picture[below] = lower
    return picture.clip(0, 1)


@functools.cache
def _positions() -> tuple[np.ndarray, np.ndarray]:
    """Return x, 0 to 2, and y, 0 to 1, of the pixels of a panorama before it is averaged down."""
    rows, columns = SIDE * OVERSAMPLING, WIDTH * OVERSAMPLING
    x, y = np.meshgrid(
        2 * (np.arange(columns, dtype=np.float32) + 0.5) / columns,
        (np.arange(rows, dtype=np.float32) + 0.5) / rows,
        indexing="xy",
    )
    return x, y


@functools.cache
def _sky(sky: str, cartoon: bool) -> np.ndarray:
    """Return the sky in the whole panorama, before it is averaged down; it is cached and must not be changed."""
    x, y = _positions()
    top, bottom = (np.array(colour, np.float32) for colour in SKY[sky])
    share = (y / HORIZON).clip(0, 1)
    if cartoon:
        share = np.floor(share * 3.999) / 3
    picture = top + share[..., None] * (bottom - top)
    if sky == "night":
        rng = np.random.default_rng(3)
        for star_x, star_y, size in zip(2 * rng.random(16), 0.5 * rng.random(16), rng.random(16), strict=True):
            away = np.hypot(_around(x - star_x), y - star_y)
            glow = 1 - np.clip((away - 0.007 - 0.006 * size) / 0.007, 0, 1)
            picture = _blend(picture, (0.95, 0.95, 0.85), (0.5 + 0.5 * size) * glow)
        # One moon in each half, so that nearly every window shows one.
        for moon in (0.72, 1.72):
            away, bite = np.hypot(_around(x - moon), y - 0.17), np.hypot(_around(x - moon + 0.035), y - 0.15)
            picture = _blend(picture, (0.99, 0.96, 0.80), _edge(0.075 - away) * _edge(bite - 0.062))
        return picture
    for sun in (0.74, 1.74):
        height, radius = (0.17, 0.075) if sky == "day" else (0.44, 0.12)
        away = np.hypot(_around(x - sun), y - height)
        if not cartoon:
            picture = _blend(picture, (1.0, 0.93, 0.72), 0.6 * np.exp(-((away / (2.2 * radius)) ** 2)))
        picture = _blend(picture, (1.0, 0.95, 0.70) if sky == "day" else (1.0, 0.87, 0.55), _edge(radius - away))
    white = np.array((1.0, 1.0, 1.0) if sky == "day" else (1.0, 0.82, 0.76), np.float32)
    for cloud_x, cloud_y, scale in ((0.25, 0.20, 1.0), (1.08, 0.13, 0.8), (1.42, 0.32, 0.75)):
        cover = np.zeros_like(x)
        for dx, dy, radius in (
            (-0.11, 0.015, 0.05),
            (-0.04, -0.015, 0.065),
            (0.045, -0.022, 0.07),
            (0.115, 0.012, 0.05),
        ):
            away = np.hypot(_around(x - cloud_x - scale * dx), (y - cloud_y - scale * dy) * 1.15) - scale * radius
            cover = np.maximum(cover, _edge(-away, 0.004 if cartoon else 0.02))
        cover *= 1 - np.clip((y - cloud_y - 0.03 * scale) / 0.012, 0, 1)  # Clouds are flat at the bottom.
        picture = _blend(picture, white, 0.95 * cover)
    return picture


def _ridges(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the heights of the far and the near hills above the horizon; their period divides the panorama."""
    turn = np.pi * x
    far = 0.10 + 0.045 * np.sin(2 * turn + 0.4) + 0.02 * np.sin(5 * turn + 2.0)
    near = 0.05 + 0.03 * np.sin(3 * turn + 3.4) + 0.012 * np.sin(7 * turn)
    return far, near


def _ground(x: np.ndarray, near: np.ndarray, ground: str, cartoon: bool) -> np.ndarray:
    far, close = (np.array(colour, np.float32) for colour in GROUND[ground])
    share = np.floor(near * 2.999) / 2 if cartoon else near
    land = far + share[..., None] * (close - far)
    turn = np.pi * x
    depth = 1 / (1.15 - near)  # Rows are closer together towards the horizon.
    if ground == "grass":
        stripes = np.tanh(4 * np.sin(8 * turn + 3.0 * near))
        land = land * (1 + 0.05 * stripes[..., None])
    elif ground == "sand":
        ripples = np.sin(14 * depth + 2 * np.sin(3 * turn))
        land = land * (1 + 0.035 * ripples[..., None])
    elif ground == "snow":
        drifts = np.sin(7 * depth + 1.5 * np.sin(2 * turn + 1))
        land = land * (1 + np.multiply.outer(0.03 * drifts, np.array((1.0, 0.8, 0.5), np.float32)))
    elif ground == "road":
        verge = 1 - _edge(near - 0.14, 0.02)
        land = _blend(land, (0.50, 0.62, 0.42), verge)
        land = _blend(land, (0.88, 0.88, 0.86), _line(near - 0.2, 0.025))
        dashes = _edge(np.sin(6 * turn) - 0.1, 0.15) * _line(near - 0.80, 0.045)
        land = _blend(land, (0.95, 0.93, 0.80), dashes)
    else:
        waves = np.sin(16 * depth + 1.6 * np.sin(4 * turn + 5 * near))
        land = _blend(land, (0.80, 0.93, 0.95), 0.30 * _edge(waves - 0.72, 0.5))
    return land.astype(np.float32)


def _around(dx: np.ndarray) -> np.ndarray:
    """Return the signed distance along the shorter way around the panorama, whose width is 2."""
    return (dx + 1) % 2 - 1


def _edge(inside: np.ndarray, softness: float = 0.002) -> np.ndarray:
    """Return 1 where `inside` is positive and 0 where it is negative, with a ramp of width `softness` between them."""
    return (0.5 + inside / softness).clip(0, 1)


def _line(away: np.ndarray, width: float) -> np.ndarray:
    return _edge(width / 2 - np.abs(away))


def _blend(below: np.ndarray, above: np.ndarray | tuple[float, ...], cover: np.ndarray) -> np.ndarray:
    """Blend `above` over `below` (`h w c`) with the opacity `cover` (`h w`, 0 to 1)."""
    return below + cover[..., None].astype(np.float32) * (np.asarray(above, np.float32) - below)


def _reduce(picture: np.ndarray, factor: int) -> np.ndarray:
    h, w, c = picture.shape
    return picture.reshape(h // factor, factor, w // factor, factor, c).mean((1, 3), dtype=np.float32)
