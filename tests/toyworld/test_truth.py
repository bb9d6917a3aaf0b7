"""Reading pictures by the palette: right on the world's own pictures, and wrong where the picture is wrong."""

import numpy as np
import pytest
from PIL import Image

from toyworld.renderer import empty_picture, render
from toyworld.samples import random_scene
from toyworld.scenes import Scene
from toyworld.truth import look, track_error


def noisy(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As a decoder leaves it: half blurred, with some noise."""
    small = (
        Image.fromarray(picture).resize((64, 64), Image.Resampling.BOX).resize((128, 128), Image.Resampling.BILINEAR)
    )
    mixed = 0.5 * picture + 0.5 * np.asarray(small) + rng.normal(0, 4, picture.shape)
    return mixed.clip(0, 255).astype(np.uint8)


@pytest.mark.slow
def test_pictures_of_the_world_are_read_right():
    rng = np.random.default_rng(7)
    errors = []
    for _ in range(60):
        scene, time = random_scene(rng, unseen=True), float(rng.random())
        seen = look(noisy(render(scene, time), rng))
        assert (seen.ground, seen.sky) == (scene.ground, scene.sky)
        errors.append(seen.colour != scene.colour)
    assert np.mean(errors) <= 0.02


def test_a_track_is_right_where_the_object_is_and_wrong_where_it_is_not():
    rng = np.random.default_rng(8)
    for _ in range(25):
        scene, time = random_scene(rng), float(rng.random())
        assert track_error(look(noisy(render(scene, time), rng)).region, scene, time) < 0.03
    scene = Scene(motion="rolling")
    assert track_error(look(render(scene, 0.0)).region, scene, 1.0) == pytest.approx(0.56, abs=0.03)


def test_another_object_in_the_right_place_is_on_track():
    scene = Scene(motion="rolling")
    for other in ("cube", "car", "tree"):
        assert track_error(look(render(scene.edited(object=other, colour="blue"), 0.4)).region, scene, 0.4) < 0.06


def test_an_empty_landscape_has_no_object():
    scene = Scene(ground="sea", sky="sunset")
    picture = np.rint(255 * empty_picture(scene)).astype(np.uint8)
    seen = look(picture)
    assert (seen.ground, seen.sky, seen.colour) == ("sea", "sunset", None) and not seen.region.any()
    assert track_error(look(picture).region, scene, 0.5) == 0.5
