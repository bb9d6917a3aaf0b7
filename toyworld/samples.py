"""Random scenes, and which of them the training never sees."""

from __future__ import annotations

import numpy as np

from .scenes import ATTRIBUTES, COLOURS, GROUNDS, MOTIONS, OBJECTS, Scene


def held_out(scene: Scene) -> bool:
    """Whether the scene's combination of object, colour and ground is kept from the training: one in seven is.

    Every object, colour and ground is seen, and so is every pair of them; only these triples are not.
    """
    place = OBJECTS.index(scene.object) + 2 * COLOURS.index(scene.colour) + 3 * GROUNDS.index(scene.ground)
    return place % 7 == 0


def random_scene(rng: np.random.Generator, unseen: bool = False) -> Scene:
    """A scene of the training set, or with ``unseen`` one that it holds out. Attributes are equally likely."""
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
