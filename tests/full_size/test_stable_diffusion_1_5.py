"""Stable Diffusion 1.5 in full size, with random weights: inflated from a folder, a step of tuning, a step of editing."""

import gc
import math
import shutil

import psutil
import pytest
import torch
from diffusers import UNet2DConditionModel

from tav_model import Tuner, TuningConfig, UNet3DConditionModel
from tests.support.models import noise, pipeline, scheduler

pytestmark = [pytest.mark.full_size, pytest.mark.slow]

GIB = 2**30
# The config of the UNet that Stable Diffusion 1.5 was published with.
CONFIG = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
}
LATENTS = noise(1, 4, 2, 16, 16)
CAPTION, EMPTY = noise(1, 77, 768, seed=1), noise(1, 77, 768, seed=2)


def write_image_unet(folder):
    """Write a UNet of small random weights, the same 2 million again and again: drawing them all takes long."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**CONFIG)
    unet.to_empty(device="cpu")
    values = torch.empty(2**21).normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if parameter.ndim > 1:
                count = parameter.numel()
                parameter.copy_(values.repeat(-(-count // len(values)))[:count].view_as(parameter))
            else:
                parameter.fill_(float("norm" in name and name.endswith("weight")))
    unet.save_pretrained(folder)


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    """The inflated model; the image model's files go with it."""
    folder = tmp_path_factory.mktemp("stable-diffusion")
    memory, disk = psutil.virtual_memory().available / GIB, shutil.disk_usage(folder).free / GIB
    if memory < 8 or disk < 5:
        pytest.skip(f"needs 8 GiB of free memory and 5 of disk; here are {memory:.1f} and {disk:.1f}")
    try:
        write_image_unet(folder / "unet")
        gc.collect()
        yield UNet3DConditionModel.from_pretrained_2d(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_trains_74_of_909_million_parameters(unet):
    assert round(sum(parameter.numel() for parameter in unet.parameters()) / 1e6) == 909
    assert round(sum(parameter.numel() for parameter in unet.trainable_parameters().values()) / 1e6) == 74


def test_a_step_of_tuning_and_its_file(unet, tmp_path):
    tuner = Tuner(unet, scheduler(), TuningConfig(steps=1, gradient_checkpointing=True))
    name = "up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_q.weight"
    before = tuner.parameters[name].detach().clone()
    record = tuner.step(LATENTS, torch.zeros_like(LATENTS), CAPTION)
    assert math.isfinite(record.loss) and record.gradient_norm > 0
    after = tuner.parameters[name].detach().clone()
    assert not torch.equal(after, before)

    del tuner
    unet.save_tuned(tmp_path)
    with torch.no_grad():
        unet.trainable_parameters()[name].zero_()
    unet.load_tuned(tmp_path)
    assert torch.equal(unet.trainable_parameters()[name], after)
    size = (tmp_path / "tuned.safetensors").stat().st_size
    shutil.rmtree(tmp_path)
    assert size < 310e6


def test_a_step_of_guided_editing(unet):
    # The other parts have no say in this: they are small ones.
    edited = pipeline(unet=unet.eval())(
        prompt_embeds=CAPTION,
        negative_prompt_embeds=EMPTY,
        latents=LATENTS,
        num_inference_steps=1,
        guidance_scale=12.5,
        output_type="latent",
    ).frames
    assert edited.shape == LATENTS.shape
    assert edited.isfinite().all()
    assert not torch.equal(edited, LATENTS)
