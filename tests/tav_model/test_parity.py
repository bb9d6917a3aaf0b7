"""Parity with the original Tune-A-Video code, by tensors that it computed: see tests/golden/README.md."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from safetensors.torch import load_file

from tav_model import Tuner, TuningConfig, UNet3DConditionModel, ddim_inversion
from tests.support.models import pipeline, relative

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "sd1-tiny"
SCHEDULER = json.loads((GOLDEN / "scheduler_config.json").read_text())


@pytest.fixture(scope="module")
def golden() -> SimpleNamespace:
    tensors = load_file(GOLDEN / "tensors.safetensors")
    return SimpleNamespace(**{name.replace(".", "_"): tensor for name, tensor in tensors.items()})


@pytest.fixture
def unet() -> UNet3DConditionModel:
    """The inflated base with the original's weights in the modules that inflation adds."""
    unet = UNet3DConditionModel.from_pretrained_2d(GOLDEN)
    temporal = load_file(GOLDEN / "temporal.safetensors")
    unexpected = unet.load_state_dict(temporal, strict=False).unexpected_keys
    assert not unexpected
    assert temporal.keys() == {name for name in unet.state_dict() if ".attn_temp." in name or ".norm_temp." in name}
    return unet


@pytest.fixture(scope="module")
def tuned(golden):
    """Four steps on the original's noise and timesteps: losses, first gradients, parameters after."""
    unet = UNet3DConditionModel.from_pretrained_2d(GOLDEN)
    unet.load_state_dict(load_file(GOLDEN / "temporal.safetensors"), strict=False)
    tuner = Tuner(unet, DDPMScheduler.from_config(SCHEDULER), TuningConfig(steps=4, learning_rate=1e-3))
    losses, gradients = [], {}
    for noise, timestep in zip(golden.tune_noise, golden.tune_timesteps, strict=True):
        losses.append(tuner.backward(golden.x0, noise, timestep[None], golden.cond))
        gradients = gradients or {name: value.grad.clone() for name, value in tuner.parameters.items()}
        tuner.update(losses[-1], float(timestep))
    return SimpleNamespace(losses=losses, gradients=gradients, parameters=tuner.parameters)


def golden_tuning(kind: str) -> dict[str, torch.Tensor]:
    tensors = load_file(GOLDEN / "tune.safetensors")
    return {name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)}


def test_forward(golden, unet):
    with torch.no_grad():
        ours = unet(golden.forward_sample, golden.forward_timestep, golden.forward_context).sample
    assert relative(ours, golden.forward_output) < 1e-4


def test_forward_in_channels_last_memory_order(golden, unet):
    sample = golden.forward_sample.contiguous(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        ours = unet(sample, golden.forward_timestep, golden.forward_context).sample
    assert relative(ours, golden.forward_output) < 1e-4


def test_inversion_trajectory(golden, unet):
    seen = []
    unet.register_forward_pre_hook(lambda _, inputs: seen.append(int(inputs[1])))
    trajectory = ddim_inversion(unet, DDIMScheduler.from_config(SCHEDULER), golden.x0, golden.uncond, num_steps=6)
    assert seen == golden.inversion_timesteps.tolist()
    assert trajectory.shape == golden.inversion_trajectory.shape
    assert torch.equal(trajectory[0], golden.x0)
    for ours, theirs in zip(trajectory, golden.inversion_trajectory, strict=True):
        assert relative(ours, theirs) < 1e-4


def test_guided_edit_trajectory(golden, unet):
    pipe = pipeline(unet=unet, scheduler=DDIMScheduler.from_config(SCHEDULER))
    trajectory, timesteps = [golden.edit_trajectory[0]], []

    def collect(_, __, timestep, tensors):
        trajectory.append(tensors["latents"])
        timesteps.append(int(timestep))
        return {}

    last = pipe(
        prompt_embeds=golden.cond,
        negative_prompt_embeds=golden.uncond,
        latents=golden.inversion_trajectory[-1],
        num_inference_steps=6,
        guidance_scale=float(golden.edit_guidance_scale),
        output_type="latent",
        callback_on_step_end=collect,
    ).frames
    assert timesteps == golden.edit_timesteps.tolist()
    assert torch.equal(last, trajectory[-1])
    assert len(trajectory) == len(golden.edit_trajectory)
    for ours, theirs in zip(trajectory, golden.edit_trajectory, strict=True):
        assert relative(ours, theirs) < 1e-4


def test_trainable_names(unet):
    theirs = json.loads((GOLDEN / "trainable.json").read_text())["trainable"]
    assert sorted(unet.trainable_parameters()) == sorted(theirs)


def test_losses(golden, tuned):
    torch.testing.assert_close(torch.tensor(tuned.losses), golden.tune_losses, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", sorted(golden_tuning("grad.")))
def test_gradient_before_clipping(tuned, name):
    assert relative(tuned.gradients[name], golden_tuning("grad.")[name]) < 1e-3


@pytest.mark.parametrize("name", sorted(golden_tuning("after.")))
def test_parameter_after_four_steps(tuned, name):
    assert relative(tuned.parameters[name].detach(), golden_tuning("after.")[name]) < 1e-4
