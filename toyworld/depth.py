"""Render how near everything in a scene is, exactly: the condition of the depth control network."""

from __future__ import annotations

import numpy as np

from toyworld.backdrops import SIDE
from toyworld.renderer import render_with_mask
from toyworld.scenes import GROUND_LINE, HORIZON, Scene


def nearness(y: np.ndarray | float) -> np.ndarray:
    """Return the inverse distance of the ground at heights y of the picture, 0 at the horizon and 1 at the lower edge.

    A plane's inverse distance is linear in the picture. The sky and the hills are infinitely far away.
    """
    return np.clip((np.asarray(y, np.float32) - HORIZON) / (1 - HORIZON), 0, 1)


def render_depth(scene: Scene, time: float) -> np.ndarray:
    """Return the inverse distance of each pixel at a time from 0 to 1, as (128, 128, 3) uint8 with equal channels.

    The object is flat and upright. It stands, or flies, above the line of the ground that it touches. White is near, as
    in the depth that published control networks were trained on.
    """
    _, mask = render_with_mask(scene, time)
    ground = nearness((np.arange(SIDE) + 0.5) / SIDE)[:, None]
    near = ground + mask * (nearness(GROUND_LINE) - ground)
    return np.repeat(np.rint(255 * near).astype(np.uint8)[..., None], 3, axis=-1)
