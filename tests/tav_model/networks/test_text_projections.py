"""Keys and values of the text: computed once, the same to the bit, and forgotten afterwards."""

from __future__ import annotations

import pytest
import torch

from tav_model.networks.text_projections import KEPT, TextBatches, text_projected_once
from tests.support.models import CONTEXT_DIM, noise, pipeline, video_unet

SAMPLE = noise(2, 4, 3, 8, 8)


def layers(unet):
    return [module for name, module in unet.named_modules() if name.endswith("attn2")]


@pytest.fixture
def counted(monkeypatch):
    """A UNet, and the number of its keys that were computed."""
    unet, calls = video_unet(), []
    for layer in layers(unet):
        layer.to_k.register_forward_hook(lambda *_: calls.append(1))
    return unet, calls


@torch.no_grad()
def test_the_same_text_is_projected_once_and_predictions_keep_their_bits(counted):
    unet, calls = counted
    one, other = noise(2, 7, CONTEXT_DIM), noise(2, 7, CONTEXT_DIM, seed=1)
    expected = [unet(SAMPLE, step, text).sample for step in (900, 500) for text in (one, other)]
    calls.clear()
    with text_projected_once(unet):
        predicted = [unet(SAMPLE, step, text).sample for step in (900, 500) for text in (one, other)]
        assert len(calls) == 2 * len(layers(unet))
        assert not torch.equal(unet(SAMPLE, 900, one.clone() + 1).sample, predicted[0])
    assert all(torch.equal(*pair) for pair in zip(predicted, expected, strict=True))
    calls.clear()
    unet(SAMPLE, 900, one)
    assert len(calls) == len(layers(unet))  # Nothing is kept afterwards.


@torch.no_grad()
def test_the_number_of_texts_that_are_kept_is_limited(counted):
    unet, calls = counted
    texts = [noise(2, 7, CONTEXT_DIM, seed=i) for i in range(KEPT + 1)]
    with text_projected_once(unet):
        for text in texts:
            unet(SAMPLE, 900, text)
        calls.clear()
        unet(SAMPLE, 900, texts[-1])
        assert not calls
        unet(SAMPLE, 900, texts[0])
        assert calls


def test_the_layers_are_ordinary_ones_after_an_error():
    unet = video_unet()
    with pytest.raises(RuntimeError), text_projected_once(unet):
        raise RuntimeError
    assert all("project_context" not in vars(layer) for layer in layers(unet))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_network_is_left_as_it_is(in_place):
    unet = video_unet()
    compiled = unet if in_place else torch.compile(unet, backend="eager")
    if in_place:
        unet.compile(backend="eager")
    with text_projected_once(compiled):
        assert all("project_context" not in vars(layer) for layer in layers(unet))


def test_the_same_texts_make_the_same_batch():
    batches, a, b = TextBatches(), noise(1, 2, 3), noise(2, 2, 3, seed=1)
    both = batches([a, b])
    assert torch.equal(both, torch.cat([a, b])) and batches([a, b]) is both
    assert batches([b, a]) is not both and batches([a]) is not both
    assert batches([a.clone(), b]) is not both


def test_a_sampling_projects_each_text_once():
    pipe, calls = pipeline(), []
    for layer in layers(pipe.unet):
        layer.to_v.register_forward_hook(lambda *_: calls.append(1))
    pipe("a cat", latents=SAMPLE[:1], num_inference_steps=5, guidance_scale=4.0, output_type="latent")
    assert len(calls) == len(layers(pipe.unet))
