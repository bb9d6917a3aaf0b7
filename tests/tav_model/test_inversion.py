"""DDIM inversion against its equation written by hand, with models that predict noise and such that predict velocity."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from tav_model import ddim_inversion
from tests.support.models import CONTEXT_DIM, SCHEDULER, SD2, noise, pipeline, relative, scheduler, video_unet

KINDS = ("epsilon", "v_prediction")


class GaussianModel:
    """The exact prediction for latents that are normally distributed with `variance`: with `V = a * variance + 1 - a`,

    e(x, t) = sqrt(1 - a) x / V,    x0(x, t) = sqrt(a) variance x / V,    v = sqrt(a) e - sqrt(1 - a) x0.
    """

    dtype = torch.float64

    def __init__(self, variance: float, scheduler: DDIMScheduler) -> None:
        self.variance, self.kind = variance, scheduler.config.prediction_type
        self.alphas = scheduler.alphas_cumprod.double()

    def spread(self, timestep: int) -> float:
        """The standard deviation of noisy latents at a timestep."""
        a = self.alphas[timestep].item()
        return math.sqrt(a * self.variance + 1 - a)

    def __call__(self, sample, timestep, _):
        a = self.alphas[int(timestep)]
        clean = a.sqrt() * self.variance * sample / self.spread(int(timestep)) ** 2
        epsilon = (1 - a).sqrt() * sample / self.spread(int(timestep)) ** 2
        return SimpleNamespace(
            sample=epsilon if self.kind == "epsilon" else a.sqrt() * epsilon - (1 - a).sqrt() * clean
        )


def inversion_by_hand(model, alphas, first_alpha, timesteps, stride, kind, x):
    """Equation 12 of the DDIM paper read backwards, in Python floats for the schedule."""
    trajectory = [x]
    for t in timesteps:
        before = t - stride
        a = alphas[min(before, len(alphas) - 1)] if before >= 0 else first_alpha
        predicted = model(x, t)
        if kind == "epsilon":
            epsilon = predicted
            clean = (x - math.sqrt(1 - a) * epsilon) / math.sqrt(a)
        else:
            epsilon = math.sqrt(a) * predicted + math.sqrt(1 - a) * x
            clean = math.sqrt(a) * x - math.sqrt(1 - a) * predicted
        x = math.sqrt(alphas[t]) * clean + math.sqrt(1 - alphas[t]) * epsilon
        trajectory.append(x)
    return torch.stack(trajectory)


def sample(model, scheduler, x, steps):
    """DDIM sampling without guidance."""
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        x = scheduler.step(model(x, timestep, None).sample, timestep, x).prev_sample
    return x


@settings(max_examples=30)
@given(
    kind=st.sampled_from(KINDS),
    steps=st.sampled_from([1, 2, 3, 7, 50]),
    spacing=st.sampled_from(["leading", "trailing"]),
    steps_offset=st.integers(0, 1),
    to_one=st.booleans(),
    variance=st.floats(0.1, 5),
)
def test_equation(kind, steps, spacing, steps_offset, to_one, variance):
    base = scheduler(prediction_type=kind, timestep_spacing=spacing, steps_offset=steps_offset, set_alpha_to_one=to_one)
    model = GaussianModel(variance, base)
    alphas = base.alphas_cumprod.tolist()
    if spacing == "leading":
        timesteps = [i * (1000 // steps) + steps_offset for i in range(steps)]
    else:
        timesteps = [round(1000 - i * 1000 / steps) - 1 for i in reversed(range(steps))]
    x = noise(1, 4, 2, 3, 3).double()
    first_alpha = 1.0 if to_one else alphas[0]
    expected = inversion_by_hand(
        lambda x, t: model(x, t, None).sample, alphas, first_alpha, timesteps, 1000 // steps, kind, x
    )
    trajectory = ddim_inversion(model, base, x, torch.zeros(1, 1, 1), steps)
    assert trajectory.shape == (steps + 1, *x.shape)
    torch.testing.assert_close(trajectory, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "shape"), [("epsilon", {}), ("v_prediction", SD2)], ids=["sd1", "sd2"])
def test_equation_with_a_network(kind, shape):
    unet, base = video_unet(**shape), scheduler(prediction_type=kind)
    x, text = noise(1, 4, 3, 8, 8), noise(1, 7, CONTEXT_DIM)
    alphas = base.alphas_cumprod.tolist()

    @torch.no_grad()
    def model(x, t):
        return unet(x, t, text).sample

    expected = inversion_by_hand(model, alphas, alphas[0], [1, 201, 401, 601, 801], 200, kind, x)
    assert relative(ddim_inversion(unet, base, x, text, 5), expected) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variance", [0.25, 1.0, 4.0])
def test_inverted_latents_lead_back_to_the_start(kind, variance):
    base = scheduler(prediction_type=kind)
    model = GaussianModel(variance, base)
    x = noise(1, 4, 2, 3, 3).double() * math.sqrt(variance)
    errors = []
    for steps in (125, 250, 500):
        inverted = ddim_inversion(model, base, x, torch.zeros(1, 1, 1), steps)[-1]
        errors.append(relative(sample(model, base, inverted, steps), x))
    assert errors[2] < 0.01
    assert errors[2] < 0.6 * errors[1] < 0.36 * errors[0]  # Half the step, half the error.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variance", [0.25, 1.0, 4.0])
def test_inverted_latents_have_the_spread_of_noise(kind, variance):
    base = scheduler(prediction_type=kind)
    model = GaussianModel(variance, base)
    x = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64) * math.sqrt(variance)
    inverted = ddim_inversion(model, base, x, torch.zeros(1, 1, 1), 500)[-1]
    assert inverted.item() == pytest.approx(model.spread(999), rel=0.01)


def as_velocity(unet, base):
    """The same model, but it predicts `v = (e - sqrt(1 - a) x) / sqrt(a)`, by `x = sqrt(a) x0 + sqrt(1 - a) e`."""
    predict_noise = unet.forward

    def forward(sample, timestep, text, **kwargs):
        output = predict_noise(sample, timestep, text, **kwargs)
        a = base.alphas_cumprod[int(timestep)]
        output.sample = (output.sample - (1 - a).sqrt() * sample) / a.sqrt()
        return output

    unet.forward = forward
    return unet


@pytest.fixture
def noise_and_velocity():
    """One model in both forms, with the scheduler of each."""
    bases = [scheduler(prediction_type=kind) for kind in KINDS]
    return [(video_unet(), bases[0]), (as_velocity(video_unet(), bases[1]), bases[1])]


def test_velocity_model_edits_as_the_same_model_that_predicts_noise(noise_and_velocity):
    text = {"prompt_embeds": noise(1, 7, CONTEXT_DIM), "negative_prompt_embeds": noise(1, 7, CONTEXT_DIM, seed=1)}
    of_noise, of_velocity = (
        pipeline(unet=unet, scheduler=base)(
            **text, latents=noise(1, 4, 3, 8, 8), num_inference_steps=5, guidance_scale=7.5, output_type="latent"
        ).frames
        for unet, base in noise_and_velocity
    )
    assert relative(of_velocity, of_noise) < 1e-4


@pytest.mark.slow
def test_velocity_model_inverts_as_the_same_model_that_predicts_noise(noise_and_velocity):
    # Within a step they differ (the conversion takes the level that the step comes from, the network is asked at the
    # one it goes to), but less so with every step that is shorter.
    x, text = noise(1, 4, 2, 8, 8), noise(1, 7, CONTEXT_DIM)
    differences = []
    for steps in (5, 20, 80):
        of_noise, of_velocity = (ddim_inversion(unet, base, x, text, steps)[-1] for unet, base in noise_and_velocity)
        differences.append(relative(of_velocity, of_noise))
    assert differences[1] < 0.4 * differences[0]
    assert differences[2] < 0.4 * differences[1]
    assert differences[2] < 0.08


def test_taking_velocity_for_noise_would_show(noise_and_velocity):
    (unet, base), (velocity_unet, _) = noise_and_velocity
    x, text = noise(1, 4, 2, 8, 8), noise(1, 7, CONTEXT_DIM)
    right, wrong = (ddim_inversion(model, base, x, text, 20)[-1] for model in (unet, velocity_unet))
    assert relative(wrong, right) > 0.3


def test_trajectory_starts_with_the_latents_and_holds_every_step():
    steps = []
    x = noise(1, 4, 2, 8, 8)
    trajectory = ddim_inversion(
        video_unet(), scheduler(), x, noise(1, 7, CONTEXT_DIM), 4, on_step=lambda: steps.append(1)
    )
    assert trajectory.shape == (5, 1, 4, 2, 8, 8)
    assert torch.equal(trajectory[0], x)
    assert len(steps) == 4
    assert not trajectory.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trajectory_of_a_network_in_half_precision_stays_in_float32(dtype):
    x, text = noise(1, 4, 2, 8, 8), noise(1, 7, CONTEXT_DIM)
    exact = ddim_inversion(video_unet(), scheduler(), x, text, 4)
    half = ddim_inversion(video_unet().to(dtype), scheduler(), x, text, 4)
    assert half.dtype == torch.float32
    assert relative(half, exact) < (2e-3 if dtype == torch.float16 else 2e-2)


@pytest.mark.parametrize("kind", [DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler])
@pytest.mark.parametrize("prediction", KINDS)
def test_bases_scheduler_of_any_class_inverts_as_ddim(kind, prediction, tmp_path):
    # As from a file, where all defaults are written out.
    betas = {key: SCHEDULER[key] for key in ("beta_start", "beta_end", "beta_schedule", "steps_offset")}
    kind(**betas, prediction_type=prediction).save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    to_one = kind is not PNDMScheduler  # The only one of them that has this option, off by default.
    x, text = 3 * noise(1, 4, 2, 8, 8), noise(1, 7, CONTEXT_DIM)
    of_ddim, of_other = (
        ddim_inversion(video_unet(), base, x, text, 4)
        for base in (scheduler(prediction_type=prediction, set_alpha_to_one=to_one), loaded)
    )
    assert torch.equal(of_other, of_ddim)


def test_latents_are_never_clipped():
    x = 30 * noise(1, 4, 2, 8, 8)
    text = noise(1, 7, CONTEXT_DIM)
    free, clipping = (ddim_inversion(video_unet(), scheduler(clip_sample=clip), x, text, 4) for clip in (False, True))
    assert torch.equal(free, clipping)


def test_more_steps_than_timesteps_are_refused():
    with pytest.raises(ValueError, match=r"1001.*1000"):
        ddim_inversion(video_unet(), scheduler(), noise(1, 4, 1, 8, 8), noise(1, 7, CONTEXT_DIM), 1001)


# Fixed point


@pytest.mark.parametrize(("kind", "shape"), [("epsilon", {}), ("v_prediction", SD2)], ids=["sd1", "sd2"])
def test_fixed_point_leads_back_exactly(kind, shape):
    unet, base = video_unet(**shape), scheduler(prediction_type=kind)
    x, text = 0.5 * noise(1, 4, 3, 8, 8), noise(1, 7, CONTEXT_DIM)

    def error(trajectory):
        pipe = pipeline(unet=unet, scheduler=base)
        arguments = {"num_inference_steps": 5, "guidance_scale": 1.0, "output_type": "latent"}
        return relative(pipe(prompt_embeds=text, latents=trajectory[-1], **arguments).frames, x)

    errors = [error(ddim_inversion(unet, base, x, text, 5, iterations=n, tolerance=1e-7)) for n in (1, 2, 4, 40)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4 and errors[-1] < errors[0] / 20


def test_fixed_point_solves_the_equation_of_each_step():
    unet, base = video_unet(), scheduler()
    text = noise(1, 7, CONTEXT_DIM)
    trajectory = ddim_inversion(unet, base, noise(1, 4, 3, 8, 8), text, 4, iterations=40, tolerance=1e-7)
    for before, timestep, after in zip(trajectory[:-1], (1, 251, 501, 751), trajectory[1:], strict=True):
        a, a_next = base.alphas_cumprod[max(timestep - 250, 0)], base.alphas_cumprod[timestep]
        with torch.no_grad():
            epsilon = unet(after, timestep, text).sample
        clean = (before - (1 - a).sqrt() * epsilon) / a.sqrt()
        assert relative(a_next.sqrt() * clean + (1 - a_next).sqrt() * epsilon, after) < 1e-5


def test_one_iteration_is_the_plain_inversion():
    unet, x, text = video_unet(), noise(1, 4, 2, 8, 8), noise(1, 7, CONTEXT_DIM)
    plain, one = (ddim_inversion(unet, scheduler(), x, text, 4, **kwargs) for kwargs in ({}, {"iterations": 1}))
    assert torch.equal(one, plain)


def test_iterations_stop_at_the_tolerance():
    unet, x, text = video_unet(), noise(1, 4, 2, 8, 8), noise(1, 7, CONTEXT_DIM)
    calls, residuals = [], []
    unet.register_forward_pre_hook(lambda *_: calls.append(1))
    ddim_inversion(unet, scheduler(), x, text, 4, iterations=50, tolerance=0.01, on_residual=residuals.append)
    assert 4 * 2 <= len(calls) < 4 * 20
    assert len(residuals) == 4 and max(residuals) < 0.01


def test_iterations_that_diverge_are_dropped():
    class Steep(GaussianModel):
        def __call__(self, sample, timestep, _):
            return SimpleNamespace(sample=30 * sample)

    base = scheduler()
    x = noise(1, 4, 2, 3, 3).double()
    plain, many = (ddim_inversion(Steep(1.0, base), base, x, torch.zeros(1, 1, 1), 2, iterations=n) for n in (1, 9))
    assert torch.equal(many[2], _plain_step(base, many[1])) and relative(many[1], plain[1]) < 0.5


def _plain_step(base, x):
    inverse = DDIMInverseScheduler.from_config(base.config)
    inverse.set_timesteps(2)
    return inverse.step(30 * x, 501, x).prev_sample


def test_no_iterations_are_refused():
    with pytest.raises(ValueError, match="iterations: 0 must be at least 1"):
        ddim_inversion(video_unet(), scheduler(), noise(1, 4, 1, 8, 8), noise(1, 7, CONTEXT_DIM), 2, iterations=0)


def test_negative_prompt_inversion_reproduces_guidance_1():
    """Inverted under the caption, which is prompt and negative prompt of the edit (Miyake et al., arXiv 2305.16807)."""
    pipe = pipeline()
    text = pipe.encode_prompt("a man", do_classifier_free_guidance=False)[0]
    trajectory = ddim_inversion(pipe.unet, pipe.scheduler, noise(1, 4, 3, 8, 8), text, 4)
    arguments = {"trajectory": trajectory, "num_inference_steps": 4, "output_type": "latent"}
    one = pipe("a man", guidance_scale=1.0, **arguments).frames
    for scale in (3.5, 12.5):
        for quantile in (None, 0.7):
            guided = {"guidance_scale": scale, "negative_prompt": "a man", "proximal_quantile": quantile}
            assert relative(pipe("a man", **guided, **arguments).frames, one) < 1e-4
        guided = {"guidance_scale": scale, "source_prompt": "a man", "source_negative": 1.0}
        assert relative(pipe("a man", **guided, **arguments).frames, one) < 1e-4
    assert relative(pipe("a man", guidance_scale=12.5, **arguments).frames, one) > 1e-3


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_source_is_the_negative_prompt_in_a_share_of_the_steps(share):
    """Compared with negative prompts that a callback exchanges."""
    pipe, steps = pipeline(), 4
    arguments = {"latents": noise(1, 4, 3, 8, 8), "guidance_scale": 3.0, "num_inference_steps": steps}
    arguments["output_type"] = "latent"
    embeds = {
        name: pipe.encode_prompt([text] * 2, do_classifier_free_guidance=False)[0]
        for name, text in {"source": "a man", "negative": "blurry"}.items()
    }

    def exchange(_pipe, step, _timestep, _tensors):
        return {"negative_prompt_embeds": embeds["source" if step + 1 < share * steps else "negative"]}

    expected = pipe(
        ["a dog", "a cat"],
        negative_prompt_embeds=embeds["source" if share else "negative"],
        callback_on_step_end=exchange,
        callback_on_step_end_tensor_inputs=["latents", "negative_prompt_embeds"],
        **arguments,
    )
    source = {"source_prompt": "a man", "source_negative": share}
    video = pipe(["a dog", "a cat"], negative_prompt="blurry", **source, **arguments).frames
    assert torch.equal(video, expected.frames)
    assert torch.equal(video, pipe(["a dog", "a cat"], negative_prompt="blurry", **arguments).frames) == (share == 0)


def test_weight_mixes_the_embeddings_of_the_source_and_the_negative_prompt():
    pipe = pipeline()
    arguments = {"latents": noise(1, 4, 3, 8, 8), "guidance_scale": 3.0, "num_inference_steps": 3}
    arguments["output_type"] = "latent"
    source, negative = (pipe.encode_prompt(text, do_classifier_free_guidance=False)[0] for text in ("a man", "blurry"))
    source_arguments = {"negative_prompt": "blurry", "source_prompt": "a man", "source_negative": 1.0}
    for weight in (0.0, 0.3, 1.0):
        mixed = pipe("a dog", **source_arguments, source_negative_weight=weight, **arguments).frames
        expected = pipe("a dog", negative_prompt_embeds=(1 - weight) * negative + weight * source, **arguments).frames
        assert relative(mixed, expected) < 1e-5
    assert torch.equal(mixed, pipe("a dog", **source_arguments, **arguments).frames)


def test_source_as_negative_prompt_needs_it():
    with pytest.raises(ValueError, match="source_prompt: needed for source_negative"):
        pipeline()("a dog", latents=noise(1, 4, 1, 8, 8), num_inference_steps=1, source_negative=0.5)
