"""The source's latents at any timestep, from the trajectory of an inversion."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tav_model import ddim_inversion
from tav_model.sampling import CLEAN, DDIMSampler, alpha_at
from tav_model.trajectory import Trajectory, inversion_timesteps
from tests.support.models import CONTEXT_DIM, noise, relative, scheduler, video_unet


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 4, 7, 20])
def test_levels_of_sampling_are_those_of_the_inversion(spacing, steps):
    base = scheduler(timestep_spacing=spacing)
    trajectory = Trajectory(noise(steps + 1, 1, 4, 2, 4, 4), base)
    sampled = DDIMSampler(base, steps).timesteps
    assert sampled == inversion_timesteps(base, steps)[::-1]
    for i, timestep in enumerate([*sampled, CLEAN]):
        assert torch.equal(trajectory.at(timestep), trajectory.latents[steps - i])


def test_inverted_latents_belong_to_the_last_timestep():
    base = scheduler()
    x = noise(1, 4, 2, 8, 8)
    latents = ddim_inversion(video_unet(), base, x, noise(1, 7, CONTEXT_DIM), 5)
    trajectory = Trajectory(latents, base)
    assert torch.equal(trajectory.inverted, latents[-1]) and torch.equal(trajectory.at(801), latents[-1])
    assert torch.equal(trajectory.at(CLEAN), x)


@settings(max_examples=30)
@given(timestep=st.integers(-3, 801))
def test_between_its_timesteps_it_is_what_ddim_computes_for_constant_noise(timestep):
    base = scheduler()
    clean, epsilon = noise(1, 4, 2, 4, 4), noise(1, 4, 2, 4, 4, seed=1)

    def noisy(timestep):
        a = alpha_at(base, timestep)
        return a**0.5 * clean + (1 - a) ** 0.5 * epsilon

    known = [CLEAN, *inversion_timesteps(base, 5)]
    trajectory = Trajectory(torch.stack([noisy(t) for t in known]), base)
    assert relative(trajectory.at(timestep), noisy(timestep)) < 1e-5


def test_trajectory_in_half_precision_gives_float32():
    trajectory = Trajectory(noise(6, 1, 4, 2, 4, 4).half(), scheduler())
    assert {trajectory.at(t).dtype for t in (CLEAN, 1, 100, 801)} == {torch.float32}


@settings(max_examples=20)
@given(strength=st.floats(0, 3), exactness=st.floats(0, 2))
def test_layout_of_the_start_has_its_strength_whatever_the_inversion_left(strength, exactness):
    clean, epsilon = 2 * noise(1, 4, 3, 8, 8) + 1, noise(1, 4, 3, 8, 8, seed=1)
    inverted = 0.3 + 0.5 * (exactness * (clean - 1) / 2 + epsilon)
    start = Trajectory(torch.stack([clean, inverted]), scheduler()).start(strength)
    for channel in range(4):
        z, x, before = (one[0, channel].flatten().double() for one in (clean, start, inverted))
        z = (z - z.mean()) / z.std(correction=0)
        trace = (x * z).mean()
        residual = (x - x.mean() - trace * z).std(correction=0)
        assert (trace / residual).item() == pytest.approx(strength, abs=1e-4)
        moments = [torch.stack([one.mean(), one.std()]) for one in (x, before)]
        torch.testing.assert_close(*moments, rtol=1e-5, atol=1e-6)  # The latents are float32.


def test_without_a_strength_the_start_is_the_inverted_latents():
    trajectory = Trajectory(noise(3, 1, 4, 2, 4, 4), scheduler())
    assert torch.equal(trajectory.start(), trajectory.inverted)


def test_constant_clips_have_no_layout():
    latents = torch.stack([torch.ones(1, 4, 2, 4, 4), noise(1, 4, 2, 4, 4)])
    assert torch.isfinite(Trajectory(latents, scheduler()).start(1.0)).all()


def test_timestep_beyond_the_inversion_is_refused():
    with pytest.raises(ValueError, match=r"timestep: 900 is beyond the last of the inversion, 801"):
        Trajectory(noise(6, 1, 4, 2, 4, 4), scheduler()).at(900)


@pytest.mark.parametrize("shape", [(6, 4, 2, 4, 4), (6, 2, 4, 2, 4, 4), (1, 1, 4, 2, 4, 4)])
def test_what_is_no_trajectory_is_refused(shape):
    with pytest.raises(ValueError, match=r"trajectory: .* must be n \+ 1, 1, c, f, h, w"):
        Trajectory(noise(*shape), scheduler())
