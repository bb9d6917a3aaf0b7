"""Draw random scenes, and hold some of them out from training."""

from __future__ import annotations

from typing import Any

import numpy as np

from toyworld.scenes import ACCENTS, ATTRIBUTES, COLOURS, GROUNDS, MOTIONS, OBJECTS, PATTERNS, Scene


def held_out(scene: Scene) -> bool:
    """Return whether the scene is held out from training, as one in seven combinations of object, colour and ground is.

    Training sees every object, colour and ground, and every pair of them; only these triples are held out.
    """
    place = OBJECTS.index(scene.object) + 2 * COLOURS.index(scene.colour) + 3 * GROUNDS.index(scene.ground)
    return place % 7 == 0


def random_scene(rng: np.random.Generator, unseen: bool = False) -> Scene:
    """Return a scene of the training set or, if `unseen`, one that is held out. All values are equally likely."""
    while True:
        words: dict[str, Any] = {name: allowed[rng.integers(len(allowed))] for name, allowed in ATTRIBUTES.items()}
        scene = Scene(
            **words,
            motion=MOTIONS[rng.integers(len(MOTIONS))],
            radius=float(rng.uniform(0.15, 0.23)),
            start=float(rng.uniform(0.12, 0.88)),
            end=float(rng.uniform(0.12, 0.88)),
            view=float(rng.random()),
            pan=float(rng.uniform(-0.4, 0.4)),
            **random_identity(rng),
        )
        if held_out(scene) == unseen:
            return scene


def random_identity(rng: np.random.Generator) -> dict[str, Any]:
    """Return a pattern, its accent, phase and slant, as keyword arguments of `Scene`."""
    return {
        "pattern": PATTERNS[rng.integers(len(PATTERNS))],
        "accent": ACCENTS[rng.integers(len(ACCENTS))],
        "phase": float(rng.random()),
        "slant": float(rng.random()),
    }
