"""Long clips that are computed slice by slice are bit-identical to those computed in one piece."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tav_model import frame_slices
from tav_model.frame_slices import by_frames
from tav_model.guidance import guided_prediction
from tav_model.sampling import SAMPLERS
from tav_model.trajectory import Trajectory
from tests.support.models import noise, scheduler

FRAMES = 7


def clip(seed, frames=FRAMES):
    return noise(2, 4, frames, 3, 5, seed=seed)


def sampled(name):
    sampler = SAMPLERS[name](scheduler(), 20)
    latents = clip(0)
    for step in range(20):
        text, negative = clip(2 * step + 1), clip(2 * step + 2)
        latents = sampler.step(guided_prediction(negative, text, 3.5), step, latents)
    return latents


def first_latents():
    return Trajectory(noise(21, 1, 4, FRAMES, 3, 5), scheduler()).start(0.5, 777, mean_match=0.7, deviation_match=0.3)


COMPUTATIONS = {
    "ddim": lambda: sampled("ddim"),
    "dpm-solver++": lambda: sampled("dpm-solver++"),
    "first latents": first_latents,
}


@pytest.mark.parametrize("name", COMPUTATIONS)
@pytest.mark.parametrize("size", [1, 3, 6])
def test_slices_are_bit_identical(name, size, monkeypatch):
    expected = COMPUTATIONS[name]()
    monkeypatch.setattr(frame_slices, "FRAMES", size)
    assert torch.equal(COMPUTATIONS[name](), expected)


@given(frames=st.integers(1, 200), in_place=st.booleans())
def test_by_frames(frames, in_place):
    first, second = clip(0, frames=frames), clip(1, frames=frames)
    before = first.clone()
    lengths = []

    def function(a, b):
        lengths.append(a.shape[2])
        return a - 2 * b

    result = by_frames(function, first, second, out=first if in_place else None)
    assert torch.equal(result, before - 2 * second)
    assert max(lengths) <= frame_slices.FRAMES and sum(lengths) == frames
    replaced = in_place and frames > frame_slices.FRAMES
    assert (result is first) == replaced
    assert torch.equal(first, result if replaced else before)
