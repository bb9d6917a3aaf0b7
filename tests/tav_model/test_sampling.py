"""Samplers against diffusers' schedulers, and noise levels that match those of an inversion."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from tav_model.sampling import CLEAN, DDIMSampler, DPMSolverSampler, alpha_at, predicted_clean_and_noise
from tests.support.models import SCHEDULER, noise, relative, scheduler

KINDS = ("epsilon", "v_prediction", "sample")
SHAPE = (2, 4, 3, 5, 5)


def run(sampler, predict, x, **kwargs):
    for step, timestep in enumerate(sampler.timesteps):
        x = sampler.step(predict(x, int(timestep)), step, x, **kwargs)
    return x


def predict(x, timestep):
    """Any smooth function of latents and timestep."""
    return torch.sin(2 * x + timestep / 300)


@settings(max_examples=40)
@given(
    kind=st.sampled_from(KINDS),
    steps=st.sampled_from([1, 2, 3, 7, 20, 50]),
    spacing=st.sampled_from(["leading", "trailing"]),
    steps_offset=st.integers(0, 1),
    to_one=st.booleans(),
    eta=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_ddim_has_the_bits_of_diffusers(kind, steps, spacing, steps_offset, to_one, eta):
    changes = {"timestep_spacing": spacing, "steps_offset": steps_offset, "set_alpha_to_one": to_one}
    base = scheduler(prediction_type=kind, **changes)
    sampler = DDIMSampler(base, steps)
    ours = theirs = noise(*SHAPE)
    variance_noise = noise(*SHAPE, seed=1)
    assert sampler.timesteps == base.timesteps.tolist()
    for step, timestep in enumerate(base.timesteps):
        output = predict(theirs, int(timestep))
        theirs = base.step(output, timestep, theirs, eta=eta, variance_noise=variance_noise).prev_sample
        ours = sampler.step(output, step, ours, eta, variance_noise)
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' own
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("to_one", [False, True])
def test_dpm_solver_is_that_of_diffusers(kind, steps, to_one):
    ours = DPMSolverSampler(scheduler(prediction_type=kind, set_alpha_to_one=to_one), steps, first_timestep=951)
    betas = {key: SCHEDULER[key] for key in ("beta_start", "beta_end", "beta_schedule")}
    theirs = DPMSolverMultistepScheduler(
        **betas,
        prediction_type=kind,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero" if to_one else "sigma_min",
    )
    theirs.set_timesteps(timesteps=ours.timesteps)
    x = noise(*SHAPE)
    expected = x
    for timestep in theirs.timesteps:
        expected = theirs.step(predict(expected, int(timestep)), timestep, expected).prev_sample
    assert relative(run(ours, predict, x), expected) < 1e-4


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("make", [DDIMSampler, DPMSolverSampler])
@settings(max_examples=20)
@given(inversion_steps=st.integers(1, 60), steps=st.integers(1, 60))
def test_sampling_starts_where_inversion_ended(make, spacing, inversion_steps, steps):
    base = scheduler(timestep_spacing=spacing)
    first = DDIMSampler(base, inversion_steps).timesteps[0]
    if steps > first:
        with pytest.raises(ValueError, match=rf"{steps} from timestep {first}; at most {first}"):
            make(base, steps, first)
        return
    sampler = make(base, steps, first)
    timesteps = sampler.timesteps
    assert len(timesteps) == steps and timesteps[0] == first
    assert timesteps == sorted(set(timesteps), reverse=True)
    assert sampler.next_timesteps[-1] <= 0


def test_same_number_of_steps_is_the_schedulers_own_schedule():
    own, aligned = DDIMSampler(scheduler(), 20), DDIMSampler(scheduler(), 20, first_timestep=951)
    assert own.timesteps == aligned.timesteps == list(range(951, 0, -50))
    assert own.next_timesteps == aligned.next_timesteps


def test_other_timesteps_lead_from_one_to_the_next():
    sampler = DDIMSampler(scheduler(), 4, first_timestep=951)
    assert sampler.timesteps == [951, 634, 318, 1]
    assert sampler.next_timesteps == [634, 318, 1, CLEAN]
    # With the true noise as the prediction, any steps lead along x = sqrt(a) x0 + sqrt(1 - a) e.
    base = scheduler()
    clean, epsilon = noise(*SHAPE), noise(*SHAPE, seed=1)
    x = alpha_at(base, 951) ** 0.5 * clean + (1 - alpha_at(base, 951)) ** 0.5 * epsilon
    end = alpha_at(base, CLEAN) ** 0.5 * clean + (1 - alpha_at(base, CLEAN)) ** 0.5 * epsilon
    for make in (DDIMSampler, DPMSolverSampler):
        assert relative(run(make(base, 4, first_timestep=951), lambda *_: epsilon, x), end) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_clean_latents_and_noise_are_what_the_prediction_means(kind):
    base = scheduler(prediction_type=kind)
    clean, epsilon = noise(*SHAPE), noise(*SHAPE, seed=1)
    a = base.alphas_cumprod[300]
    outputs = {"epsilon": epsilon, "sample": clean, "v_prediction": a**0.5 * epsilon - (1 - a) ** 0.5 * clean}
    found = predicted_clean_and_noise(base, outputs[kind], 300, a**0.5 * clean + (1 - a) ** 0.5 * epsilon)
    for ours, theirs in zip(found, (clean, epsilon), strict=True):
        assert relative(ours, theirs) < 1e-5


def test_noise_in_dpm_solver_is_refused():
    sampler = DPMSolverSampler(scheduler(), 2)
    with pytest.raises(ValueError, match=r"eta: 0.5 must be 0"):
        sampler.step(noise(*SHAPE), 0, noise(*SHAPE), eta=0.5)


def test_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match=r"prediction_type: 'flow'"):
        predicted_clean_and_noise(DDIMScheduler(prediction_type="flow"), noise(1), 3, noise(1))
