"""Identity error: near 0 for a rendered clip, near 1 for an object that is another one in each frame."""

import dataclasses

import numpy as np
import pytest

from toyworld.identity import identity_error
from toyworld.renderer import render
from toyworld.samples import random_identity
from toyworld.scenes import Scene

TIMES = (0.0, 0.3, 0.6, 0.9)
SCENE = Scene("ball", "blue", "grass", "day", "plain", "zigzagging", 0.2, pattern="stripes", accent="white", pan=0.3)


def frames_of(scenes: list[Scene]) -> np.ndarray:
    return np.stack([render(scene, time) for scene, time in zip(scenes, TIMES, strict=True)])


def test_the_same_object_has_nearly_none():
    assert identity_error(frames_of([SCENE] * 4), SCENE, TIMES) < 0.06


def test_other_objects_have_about_one():
    rng = np.random.default_rng(5)
    errors = []
    for _ in range(6):
        scenes = [dataclasses.replace(SCENE, **random_identity(rng)) for _ in TIMES]
        errors.append(identity_error(frames_of(scenes), SCENE, TIMES))
    assert np.mean(errors) == pytest.approx(1, abs=0.35) and min(errors) > 0.3


def test_one_frame_of_another_object_is_between():
    other = dataclasses.replace(SCENE, phase=0.5)
    error = identity_error(frames_of([SCENE, SCENE, other, SCENE]), SCENE, TIMES)
    assert 0.2 < error < identity_error(frames_of([SCENE, other, SCENE, other]), SCENE, TIMES)


def test_a_single_frame_has_no_error():
    assert identity_error(frames_of([SCENE] * 4)[:1], SCENE, TIMES[:1]) == 0
