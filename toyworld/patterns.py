"""Patterns on objects: coarse enough for latents that are an eighth of the picture's size."""

from __future__ import annotations

import numpy as np

# Lengths are multiples of the object's radius, which is about 20 pixels.
STRIPES, CHECKS, DOTS, RINGS = 0.80, 1.10, 0.85, 0.80
DOT = 0.28


def accent_share(
    pattern: str, phase: float, slant: float, x: np.ndarray, y: np.ndarray, softness: float = 1e-6
) -> np.ndarray:
    """Return where a pattern shows its accent, from 0 to 1.

    Args:
        pattern: one of `scenes.PATTERNS`.
        phase: shift, 0 to 1 of a period.
        slant: direction, 0 to 1 of half a turn.
        x: horizontal positions in the upright object, in multiples of its radius.
        y: vertical positions, which broadcast with `x`.
        softness: width of the ramp at an edge, in multiples of the radius.
    """
    angle = np.pi * slant
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    if pattern == "stripes":
        inside = STRIPES / 4 - np.abs(_nearest(along + phase * STRIPES, STRIPES))
    elif pattern == "checks":
        inside = _nearest_edge(along + phase * CHECKS, CHECKS) * _nearest_edge(across + 0.25 * CHECKS, CHECKS)
        inside = np.sign(inside) * np.sqrt(np.abs(inside))
    elif pattern == "dots":
        inside = DOT - np.hypot(_nearest(along + phase * DOTS, DOTS), _nearest(across, DOTS))
    elif pattern == "halves":
        inside = along - 0.05 - 0.3 * phase  # At most half of the object, whose colour must prevail.
    elif pattern == "rings":
        inside = RINGS / 4 - np.abs(_nearest(np.hypot(x, y) + phase * RINGS, RINGS))
    else:
        inside = np.full(np.broadcast_shapes(x.shape, y.shape), -1.0)
    return (0.5 + inside / softness).clip(0, 1).astype(np.float32)


def _nearest(x: np.ndarray, period: float) -> np.ndarray:
    """Return the signed distance to the nearest multiple of the period."""
    return (x + period / 2) % period - period / 2


def _nearest_edge(x: np.ndarray, period: float) -> np.ndarray:
    """Return the distance to the nearest multiple of half the period, positive in every other half period."""
    return period / 4 - np.abs(_nearest(x, period))
