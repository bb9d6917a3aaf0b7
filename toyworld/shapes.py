"""The objects as polygons around the origin, with x to the right and y downwards, about the size of the unit circle.

An object is a sequence of parts, drawn in order. The paint of a part determines its colour.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Part:
    """A filled polygon.

    Attributes:
        points: its corners, with shape (n, 2).
        paint: "body", "dark" or "light" for shades of the object's colour, or a key of `renderer.FIXED`.
    """

    points: np.ndarray
    paint: str


def _polygon(*points: tuple[float, float]) -> np.ndarray:
    return np.array(points, np.float64)


def _ellipse(x: float, y: float, rx: float, ry: float, start: float = 0.0, end: float = 360.0) -> np.ndarray:
    angles = np.radians(np.linspace(start, end, 40, endpoint=end - start < 360))
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], 1)


def _star(outer: float, inner: float) -> np.ndarray:
    angles = np.pi * (np.arange(10) / 5 - 0.5)
    radii = np.where(np.arange(10) % 2, inner, outer)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)


def _wheel(x: float, y: float, radius: float) -> list[Part]:
    return [Part(_ellipse(x, y, radius, radius), "tyre"), Part(_ellipse(x, y, 0.45 * radius, 0.45 * radius), "metal")]


SHAPES: dict[str, tuple[Part, ...]] = {
    "ball": (
        Part(_ellipse(0, 0, 0.95, 0.95), "body"),
        Part(np.concatenate([_ellipse(0, 0, 0.95, 0.95, -18, 18), _ellipse(0, 0, 0.95, 0.95, 162, 198)]), "light"),
        Part(_ellipse(0, 0, 0.34, 0.34), "body"),
    ),
    "cube": (
        Part(_polygon((-0.85, -0.42), (-0.42, -0.85), (0.88, -0.85), (0.45, -0.42)), "light"),
        Part(_polygon((0.45, -0.42), (0.88, -0.85), (0.88, 0.45), (0.45, 0.88)), "dark"),
        Part(_polygon((-0.85, -0.42), (0.45, -0.42), (0.45, 0.88), (-0.85, 0.88)), "body"),
    ),
    "star": (
        Part(_star(1.1, 0.5), "body"),
        Part(_star(0.55, 0.25), "light"),
    ),
    "car": (
        Part(
            _polygon((-0.62, -0.12), (-0.4, -0.6), (0.3, -0.6), (0.62, -0.1), (0.0, 0.0)),
            "body",
        ),
        Part(_polygon((-0.48, -0.1), (-0.32, -0.47), (-0.06, -0.47), (-0.06, -0.1)), "glass"),
        Part(_polygon((0.06, -0.1), (0.06, -0.47), (0.24, -0.47), (0.46, -0.1)), "glass"),
        Part(
            _polygon(
                (-1.05, 0.45), (-1.05, 0.08), (-0.95, -0.12), (0.66, -0.14), (1.0, 0.02), (1.06, 0.2), (1.06, 0.45)
            ),
            "body",
        ),
        Part(_polygon((-1.05, 0.45), (-1.05, 0.3), (1.06, 0.3), (1.06, 0.45)), "dark"),
        Part(_polygon((0.86, 0.02), (1.02, 0.08), (1.04, 0.22), (0.88, 0.2)), "lamp"),
        *_wheel(-0.58, 0.5, 0.33),
        *_wheel(0.6, 0.5, 0.33),
    ),
    "boat": (
        Part(_polygon((-0.09, 0.35), (-0.09, -1.0), (0.03, -1.0), (0.03, 0.35)), "wood"),
        Part(_polygon((-0.17, -0.9), (-0.17, 0.2), (-0.85, 0.2)), "light"),
        Part(_polygon((0.09, -0.75), (0.82, 0.2), (0.09, 0.2)), "sail"),
        Part(_polygon((-1.05, 0.3), (1.05, 0.3), (0.72, 0.85), (-0.7, 0.85)), "body"),
        Part(_polygon((-1.05, 0.3), (1.05, 0.3), (0.98, 0.43), (-0.97, 0.43)), "dark"),
    ),
    "rocket": (
        Part(_polygon((-0.26, 0.62), (0.26, 0.62), (0.13, 0.9), (0.0, 1.12), (-0.13, 0.9)), "flame"),
        Part(_polygon((-0.4, 0.1), (-0.8, 0.55), (-0.76, 0.86), (-0.28, 0.6)), "dark"),
        Part(_polygon((0.4, 0.1), (0.8, 0.55), (0.76, 0.86), (0.28, 0.6)), "dark"),
        Part(
            _polygon(
                (0, -1.1),
                (0.2, -0.88),
                (0.36, -0.55),
                (0.44, -0.15),
                (0.42, 0.25),
                (0.3, 0.66),
                (-0.3, 0.66),
                (-0.42, 0.25),
                (-0.44, -0.15),
                (-0.36, -0.55),
                (-0.2, -0.88),
            ),
            "body",
        ),
        Part(_polygon((0, -1.1), (0.2, -0.88), (0.32, -0.63), (-0.32, -0.63), (-0.2, -0.88)), "light"),
        Part(_ellipse(0, -0.12, 0.23, 0.23), "metal"),
        Part(_ellipse(0, -0.12, 0.15, 0.15), "glass"),
    ),
    "tree": (
        Part(_polygon((-0.15, 0.5), (0.15, 0.5), (0.2, 1.0), (-0.2, 1.0)), "wood"),
        Part(_polygon((0, -0.35), (0.85, 0.62), (-0.85, 0.62)), "dark"),
        Part(_polygon((0, -0.72), (0.68, 0.18), (-0.68, 0.18)), "body"),
        Part(_polygon((0, -1.1), (0.5, -0.3), (-0.5, -0.3)), "light"),
    ),
    "fish": (
        Part(_polygon((-0.5, 0.0), (-1.08, -0.52), (-0.92, 0.0), (-1.08, 0.52)), "dark"),
        Part(_polygon((-0.3, -0.4), (0.05, -0.82), (0.4, -0.4)), "dark"),
        Part(_ellipse(0.15, 0, 0.85, 0.56), "body"),
        Part(_ellipse(0.15, 0, 0.85, 0.56, 35, 145), "light"),
        Part(_ellipse(0.62, -0.14, 0.16, 0.16), "white"),
        Part(_ellipse(0.66, -0.14, 0.08, 0.08), "tyre"),
    ),
}
