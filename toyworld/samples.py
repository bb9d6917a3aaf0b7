"""Draw random scenes, and hold some of them out from training."""

from __future__ import annotations

import numpy as np

from toyworld.scenes import ATTRIBUTES, COLOURS, GROUNDS, MOTIONS, OBJECTS, Scene


def held_out(scene: Scene) -> bool:
    """Return whether the scene is held out from training, as one in seven combinations of object, colour and ground is.

    Training sees every object, colour and ground, and every pair of them; only these triples are held out.
    """
    place = OBJECTS.index(scene.object) + 2 * COLOURS.index(scene.colour) + 3 * GROUNDS.index(scene.ground)
    return place % 7 == 0


def random_scene(rng: np.random.Generator, unseen: bool = False) -> Scene:
    """Return a scene of the training set or, if `unseen`, one that is held out. All values are equally likely."""
    while True:
        words = {name: allowed[rng.integers(len(allowed))] for name, allowed in ATTRIBUTES.items()}
        scene = Scene(
            **words,
            motion=MOTIONS[rng.integers(len(MOTIONS))],
            radius=float(rng.uniform(0.14, 0.21)),
            start=float(rng.uniform(0.12, 0.88)),
            end=float(rng.uniform(0.12, 0.88)),
            view=float(rng.random()),
        )
        if held_out(scene) == unseen:
            return scene
