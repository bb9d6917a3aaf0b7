"""Sampling from a lower noise level of the trajectory."""

import pytest
import torch

from tav_model.autoregressive import edit_autoregressively
from tav_model.sampling import DDIMSampler, first_sampled_step
from tav_model.trajectory import Trajectory
from tav_model.windows import WindowOptions
from tests.support.models import noise, pipeline, relative

STEPS = 6
TRAJECTORY = noise(STEPS + 1, 1, 4, 3, 8, 8)


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


def edited(pipe, **arguments):
    defaults = {"trajectory": TRAJECTORY, "num_inference_steps": STEPS, "output_type": "latent", "guidance_scale": 2.0}
    return pipe("a dog", **defaults | arguments).frames


@pytest.mark.parametrize(("strength", "expected"), [(1.0, 0), (0.5, 3), (0.84, 1), (0.1, 5)])
def test_the_last_steps_are_sampled(strength, expected):
    assert first_sampled_step(strength, STEPS) == expected


def test_of_all_steps_nothing_changes(pipe):
    assert torch.equal(edited(pipe, strength=1.0), edited(pipe))


@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver++"])
def test_the_first_steps_are_left_to_the_source(pipe, sampler):
    """As if a callback had put the source's latents in the place of the first steps' results."""
    calls, timesteps = [], DDIMSampler(pipe.scheduler, STEPS, Trajectory(TRAJECTORY, pipe.scheduler).timesteps[-1])

    def restore(_, step, __, tensors):
        if step < 2:
            tensors["latents"] = Trajectory(TRAJECTORY, pipe.scheduler).at(timesteps.timesteps[step + 1])
        return tensors

    def count(_, step, __, tensors):
        calls.append(step)
        return tensors

    expected = edited(pipe, callback_on_step_end=restore, sampler="ddim")
    actual = edited(pipe, strength=4 / 6, callback_on_step_end=count, sampler=sampler)
    assert calls == [2, 3, 4, 5]
    if sampler == "ddim":
        assert torch.equal(actual, expected)
    assert relative(actual, edited(pipe, sampler=sampler)) > 1e-3


def test_with_the_layout_of_the_first_sampled_step(pipe):
    schedule = DDIMSampler(pipe.scheduler, STEPS, Trajectory(TRAJECTORY, pipe.scheduler).timesteps[-1])
    start = Trajectory(TRAJECTORY, pipe.scheduler).start(1.2, schedule.timesteps[3])
    expected = edited(pipe, strength=0.5, latents=start)
    assert torch.equal(edited(pipe, strength=0.5, layout_strength=1.2), expected)


@pytest.mark.parametrize(("layout_strength", "first"), [(None, None), (None, 3), (0.7, 3)])
def test_the_moments_become_those_of_noised_latents(pipe, layout_strength, first):
    source = Trajectory(0.4 * TRAJECTORY + 0.2, pipe.scheduler)
    schedule = DDIMSampler(pipe.scheduler, STEPS, source.timesteps[-1])
    timestep = schedule.timesteps[first or 0]
    before = source.start(layout_strength, timestep)
    alpha, clean = float(pipe.scheduler.alphas_cumprod[timestep]), source.latents[0]
    dims = (0, 2, 3, 4)
    for share in (0.0, 0.4, 1.0):
        after = source.start(layout_strength, timestep, share, share)
        mean = (1 - share) * before.mean(dims) + share * alpha**0.5 * clean.mean(dims)
        expected = (alpha * clean.var(dims, correction=0) + 1 - alpha).sqrt()
        deviation = before.std(dims, correction=0) ** (1 - share) * expected**share
        assert torch.allclose(after.mean(dims), mean, atol=1e-5)
        assert torch.allclose(after.std(dims, correction=0), deviation, atol=1e-5)
        unit = [(x - x.mean(dims, keepdim=True)) / x.std(dims, keepdim=True) for x in (before, after)]
        assert torch.allclose(*unit, atol=1e-4), "nothing else changes"
    strength = {} if first is None else {"strength": 1 - first / STEPS}
    arguments = {"trajectory": source.latents, "layout_strength": layout_strength, **strength}
    expected = edited(
        pipe, latents=source.start(layout_strength, timestep, 0.4, 0.7), **arguments | {"layout_strength": None}
    )
    assert torch.equal(edited(pipe, mean_match=0.4, deviation_match=0.7, **arguments), expected)


def test_other_shares_are_of_all_steps(pipe):
    """Attention that is injected in the first half of the steps has no effect on the second one."""
    control = {"n_self_replace": 0.5, "self_replace_layers": "all"}
    assert torch.equal(edited(pipe, strength=0.5, cross_attention_kwargs=control), edited(pipe, strength=0.5))
    assert not torch.equal(edited(pipe, strength=1.0, cross_attention_kwargs=control), edited(pipe))


def test_autoregressively(pipe, tmp_path):
    """A single window is the edit itself; several have as many steps each."""
    schedule = DDIMSampler(pipe.scheduler, STEPS, Trajectory(TRAJECTORY, pipe.scheduler).timesteps[-1])
    start = Trajectory(TRAJECTORY, pipe.scheduler).at(schedule.timesteps[3])
    options = {"num_inference_steps": STEPS, "guidance_scale": 2.0, "strength": 0.5, "num_inversion_steps": STEPS}
    calls = []
    for folder, length in ((tmp_path / "one", 3), (tmp_path / "two", 2)):
        calls.clear()
        parts = list(
            edit_autoregressively(
                pipe,
                "a dog",
                start,
                WindowOptions(length, 1),
                folder,
                callback_on_step_end=lambda *_: calls.append(1) or {},
                **options,
            )
        )
        frames = torch.cat([part.latents for part in parts], dim=2)
        assert frames.shape == start.shape
        assert len(calls) == 3 * len(parts)
        if length == 3:
            assert torch.equal(frames, edited(pipe, strength=0.5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": 0.01}, "strength: 0.01 of 6 steps leaves none"),
        ({"strength": 1.5}, "strength: 1.5 must be a number from 0 to 1"),
        ({"strength": 0.5, "trajectory": None, "num_frames": 3}, "trajectory: needed for strength"),
    ],
)
def test_errors(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        edited(pipe, **arguments)
