"""Silhouette: high for the right shape in any place, size and rotation; low for another shape, 0 for none."""

import numpy as np
import pytest

from toyworld.renderer import empty_picture, render
from toyworld.scenes import Scene
from toyworld.silhouette import silhouette


@pytest.mark.parametrize("name", ["star", "fish", "car"])
def test_the_right_shape_fits_wherever_it_is(name: str):
    scene = Scene(name, "red", "snow", motion="swinging", radius=0.2)
    values = [silhouette(render(scene, time), scene) for time in (0.0, 0.25)]
    assert min(values) > 0.85
    larger = Scene(name, "red", "snow", motion="growing", radius=0.2)
    assert silhouette(render(larger, 1.0), larger) > 0.85


def test_the_outline_of_a_cartoon_belongs_to_the_shape():
    scene = Scene("star", "red", "snow", "day", "cartoon", "rising", 0.2)
    assert silhouette(render(scene, 0.5), scene) > 0.85


def test_another_shape_fits_worse():
    scene = Scene("star", "red", "snow", radius=0.2)
    picture = render(scene.edited(object="ball"), 0.4)
    assert silhouette(picture, scene) < 0.7 < silhouette(render(scene, 0.4), scene)


def test_no_object_has_no_silhouette():
    scene = Scene(ground="sea", sky="sunset")
    assert silhouette(np.rint(255 * empty_picture(scene)).astype(np.uint8), scene) == 0
