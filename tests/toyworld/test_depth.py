"""The depth of a scene: a plane to the horizon, nothing beyond it, and the object where the picture shows it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toyworld.depth import nearness, render_depth
from toyworld.renderer import render_with_mask
from toyworld.samples import random_scene
from toyworld.scenes import GROUND_LINE, HORIZON, Scene


def test_the_ground_is_a_plane():
    assert nearness(HORIZON) == 0 and nearness(1) == 1 and nearness(0.1) == 0
    ground = render_depth(Scene(motion="rising"), 1.0)[:, 0, 0].astype(int)  # At the top, and not at the left edge.
    steps = np.diff(ground[82:])
    assert (ground[:79] == 0).all() and steps.min() >= 4 and steps.max() - steps.min() <= 1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.floats(0, 1))
def test_the_object_is_where_the_picture_shows_it(seed, time):
    scene = random_scene(np.random.default_rng(seed))
    depth, (_, mask) = render_depth(scene, time), render_with_mask(scene, time)
    assert depth.shape == (128, 128, 3) and depth.dtype == np.uint8 and (depth == depth[..., :1]).all()
    assert (depth[..., 0][mask == 1] == round(255 * float(nearness(GROUND_LINE)))).all()
    empty = np.where(mask == 0, depth[..., 0], 0)
    assert (empty == np.where(mask == 0, empty.max(1, keepdims=True), 0)).all(), "the ground is level"


@pytest.mark.parametrize("change", [{"colour": "blue"}, {"ground": "sea"}, {"sky": "night"}])
def test_colours_and_landscapes_do_not_change_it(change):
    scene = Scene(object="car", motion="zigzagging")
    assert np.array_equal(render_depth(scene, 0.4), render_depth(scene.edited(**change), 0.4))
    assert not np.array_equal(render_depth(scene, 0.4), render_depth(scene.edited(object="ball"), 0.4))
