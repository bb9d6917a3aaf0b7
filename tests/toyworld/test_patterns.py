"""Patterns: periodic, antialiased, and never most of an object."""

import dataclasses

import numpy as np
import pytest

from toyworld.patterns import accent_share
from toyworld.renderer import render, render_with_mask
from toyworld.samples import random_identity
from toyworld.scenes import ACCENTS, PATTERNS, Scene

X, Y = np.meshgrid(np.linspace(-1, 1, 81), np.linspace(-1, 1, 81))
INSIDE = np.hypot(X, Y) < 0.95


@pytest.mark.parametrize("pattern", [pattern for pattern in PATTERNS if pattern != "none"])
def test_the_object_s_own_colour_prevails(pattern: str):
    rng = np.random.default_rng(0)
    shares = [accent_share(pattern, rng.random(), rng.random(), X, Y)[INSIDE].mean() for _ in range(40)]
    assert min(shares) > 0.1 and max(shares) < 0.75 and 0.2 < np.mean(shares) < 0.55


def test_no_pattern_has_no_accent():
    assert not accent_share("none", 0.3, 0.3, X, Y).any()


@pytest.mark.parametrize("pattern", ["stripes", "checks", "dots", "rings"])
def test_a_phase_of_one_is_a_full_period(pattern: str):
    one, other = (accent_share(pattern, phase, 0.3, X, Y, 0.1) for phase in (0.0, 1.0))
    assert np.allclose(one, other, atol=1e-5)


def test_the_pattern_turns_with_the_object():
    scene = Scene("ball", "red", motion="rolling", pattern="halves", accent="black", slant=0.5, radius=0.2)

    def lower_half(time: float) -> float:
        picture, mask = render_with_mask(scene, time)
        pose = scene.pose(time)
        below = (np.arange(128)[:, None] > 128 * (pose.y + 0.5 * pose.radius)) & (mask > 0.99)
        return float(picture[below].mean())

    half_a_turn = np.pi * scene.radius / (scene.end - scene.start)
    assert half_a_turn > 1  # This path is too short for it.
    long = dataclasses.replace(scene, start=0.1, end=0.9)
    scene = long
    half_a_turn = np.pi * scene.radius / (scene.end - scene.start)
    assert half_a_turn < 1 and lower_half(half_a_turn) > lower_half(0.0) + 40


def test_only_painted_parts_have_the_pattern():
    """Wheels, windows and the landscape are the same with any pattern."""
    rng = np.random.default_rng(1)
    scene = Scene("car", "blue", motion="rising")
    plain = render(scene, 0.5)
    changed = np.zeros((128, 128), bool)
    for _ in range(12):
        changed |= (render(dataclasses.replace(scene, **random_identity(rng)), 0.5) != plain).any(-1)
    _, mask = render_with_mask(scene, 0.5)
    assert not changed[mask == 0].any() and 0.2 < changed[mask > 0.99].mean() < 0.8


def test_an_edit_keeps_the_identity():
    scene = Scene(pattern="dots", accent="deep", phase=0.3, slant=0.9, pan=0.2)
    edited = scene.edited(object="cube", colour="blue")
    assert (edited.pattern, edited.accent, edited.phase, edited.slant, edited.pan) == ("dots", "deep", 0.3, 0.9, 0.2)
    assert {*random_identity(np.random.default_rng(0))} == {"pattern", "accent", "phase", "slant"}
    assert len(ACCENTS) == 4


def test_the_camera_pans_and_the_object_does_not():
    still, moving = Scene(motion="rising", pan=0.0), Scene(motion="rising", pan=0.25)
    assert np.array_equal(render(still, 0.0), render(moving, 0.0))
    _, mask = render_with_mask(still, 1.0)
    assert np.array_equal(mask, render_with_mask(moving, 1.0)[1])
    landscape = mask[:60].max(0) == 0
    before, after = render(still, 1.0)[:60], render(moving, 1.0)[:60]
    # A quarter of a picture is 32 pixels.
    kept = landscape[:96] & landscape[32:]
    assert np.array_equal(before[:, 32:][:, kept], after[:, :96][:, kept])
