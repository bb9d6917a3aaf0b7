"""Reuse of deep features: exact where nothing changed, cheap in between, and off by default."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tav_model.networks.feature_reuse import FeatureReuse
from tests.support.models import CONTEXT_DIM, SD2, noise, pipeline, relative, video_unet

SAMPLE, TEXT = noise(2, 4, 3, 8, 8), noise(2, 7, CONTEXT_DIM)
SHAPES = [{}, SD2, {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}, {"layers_per_block": 2}]


def flops(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_with_the_same_input_the_outermost_layers_give_the_prediction(shape):
    unet = video_unet(**shape)
    predict, timestep = FeatureReuse(unet, 2), torch.tensor(500)
    whole = predict(SAMPLE, timestep, TEXT, 2)
    assert torch.equal(whole, unet(SAMPLE, timestep, TEXT).sample)
    assert torch.equal(predict(SAMPLE, timestep, TEXT, 2), whole)


@torch.no_grad()
def test_residuals_of_control_networks_reach_the_outermost_layer():
    unet, timestep = video_unet(), torch.tensor(500)
    predict = FeatureReuse(unet, 2)
    with torch.no_grad():
        shapes = [(2, 8, 3, 8, 8), (2, 8, 3, 8, 8), (2, 8, 3, 4, 4), (2, 16, 3, 4, 4)]
        residuals = {"down_block_additional_residuals": [noise(*shape, seed=i) for i, shape in enumerate(shapes)]}
    whole = predict(SAMPLE, timestep, TEXT, 2, **residuals)
    assert torch.equal(predict(SAMPLE, timestep, TEXT, 2, **residuals), whole)
    assert not torch.equal(whole, unet(SAMPLE, timestep, TEXT).sample)


@torch.no_grad()
def test_every_kth_step_is_computed_in_full_and_the_others_cost_a_part():
    unet = video_unet()
    predict = FeatureReuse(unet, 3)
    full = flops(lambda: unet(SAMPLE, 500, TEXT))
    spent = [flops(lambda: predict(SAMPLE, torch.tensor(500), TEXT, 2)) for _ in range(7)]
    assert [cost == full for cost in spent] == [True, False, False, True, False, False, True]
    assert max(spent[1:3]) < 0.6 * full


@torch.no_grad()
def test_another_batch_is_computed_in_full():
    unet = video_unet()
    predict, full = FeatureReuse(unet, 4), flops(lambda: unet(SAMPLE, 500, TEXT))
    spent = [flops(lambda rows=rows: predict(SAMPLE, torch.tensor(500), TEXT, rows)) for rows in (2, 2, 1, 1, 2)]
    assert [cost == full for cost in spent] == [True, False, True, False, True]


def test_in_a_sampling_it_is_off_by_default_and_changes_little():
    pipe = pipeline()

    def render(**options):
        arguments = {"latents": SAMPLE[:1], "num_inference_steps": 8, "guidance_scale": 2.0, "output_type": "latent"}
        return pipe("a cat", **arguments | options).frames

    plain = render()
    assert torch.equal(render(feature_reuse_interval=1), plain)
    reused = render(feature_reuse_interval=2)
    assert not torch.equal(reused, plain)
    assert relative(reused, plain) < 0.5
    assert flops(lambda: render(feature_reuse_interval=4)) < 0.8 * flops(render)
    with pytest.raises(ValueError, match="feature_reuse_interval: 0 must be 1 or more"):
        render(feature_reuse_interval=0)


def test_it_works_with_injected_attention_and_half_precision():
    pipe = pipeline()
    pipe.unet.to(torch.bfloat16)
    options = {
        "trajectory": noise(9, 1, 4, 3, 8, 8),
        "source_prompt": "a dog",
        "cross_attention_kwargs": {"n_self_replace": 0.5, "edit_type": "replace", "n_cross_replace": 0.3},
        "num_inference_steps": 8,
        "output_type": "latent",
    }
    frames = pipe(["a cat", "a cow"], feature_reuse_interval=3, guidance_end=0.75, **options).frames
    assert torch.isfinite(frames).all() and not torch.equal(frames, pipe(["a cat", "a cow"], **options).frames)
