"""Low-rank tuning: it starts as the image model, trains and saves the updates alone, and any consumer loads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tav_model import TavError, Tuner, TuningConfig, UNet3DConditionModel
from tav_model.base_models import load_tuned_unet
from tav_model.checkpoints import Checkpoints
from tav_model.low_rank import LowRankLinear, add_low_rank, update_shapes
from tav_model.original_checkpoints import load_original, save_original
from tav_model.personalization.base_maker import Lora, make_base
from tests.support.models import (
    CONTEXT_DIM,
    SD2,
    image_unet,
    noise,
    relative,
    scheduler,
    seeded,
    small_base,
    video_unet,
)
from tests.support.personalisation import random_lora
from tests.support.stopped_tuning import stop_after

MEAN, DEVIATION = noise(1, 4, 3, 8, 8), 0.1 * noise(1, 4, 3, 8, 8, seed=1).abs()
CAPTION, SAMPLE = noise(1, 7, CONTEXT_DIM, seed=2), noise(1, 4, 3, 8, 8, seed=3)


def inflated(seed=0, **shape) -> UNet3DConditionModel:
    torch.manual_seed(seed)
    return UNet3DConditionModel.from_unet2d(image_unet(**shape))


def tuner(unet=None, steps=4, **config) -> Tuner:
    config = TuningConfig(**{"steps": steps, "learning_rate": 1e-2, "lora_rank": 3} | config)
    return Tuner(inflated() if unet is None else unet, scheduler(), config)


@torch.no_grad()
def prediction(unet, text=CAPTION):
    return unet(SAMPLE, 400, text).sample


@given(
    width=st.integers(1, 9),
    height=st.integers(1, 9),
    rank=st.integers(1, 5),
    bias=st.booleans(),
    batch=st.integers(1, 3),
)
@settings(max_examples=20, deadline=None)
def test_a_layer_is_its_weight_plus_the_product(width, height, rank, bias, batch):
    linear = torch.nn.Linear(width, height, bias)
    layer = LowRankLinear(linear, rank, seeded(0))
    tokens = noise(batch, 2, width)
    assert torch.equal(layer(tokens), linear(tokens))
    layer.lora_up.data.copy_(noise(height, rank))
    weight = linear.weight + layer.lora_up @ layer.lora_down
    torch.testing.assert_close(layer(tokens), torch.nn.functional.linear(tokens, weight, linear.bias))


@pytest.mark.parametrize("shape", [{}, SD2], ids=["sd1", "sd2"])
def test_it_starts_as_the_image_model_with_the_spatial_attention_in_the_temporal(shape):
    before = inflated(**shape)
    one = tuner(inflated(seed=1, **shape))
    # On some processors, a product with a bias rounds differently from one to which zeros are added.
    torch.testing.assert_close(prediction(one.unet), prediction(before), atol=1e-6, rtol=1e-5)
    block = one.unet.down_blocks[0].attentions[0].transformer_blocks[0]
    for layer in ("to_q", "to_k", "to_v"):
        assert torch.equal(block.attn_temp.get_submodule(layer).weight, block.attn1.get_submodule(layer).weight)
    assert torch.equal(block.norm_temp.weight, block.norm1.weight)


def test_only_the_updates_change():
    one = tuner()
    before = {name: value.clone() for name, value in one.unet.state_dict().items()}
    one.fit(MEAN, DEVIATION, CAPTION)
    changed = {name for name, value in one.unet.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == one.parameters.keys()
    assert all(name.endswith(("lora_down", "lora_up")) for name in changed)
    assert sum(name.endswith("lora_up") for name in changed) == 6 * sum(
        isinstance(module, torch.nn.Linear) and name.endswith("attn1.to_q") for name, module in one.unet.named_modules()
    )


@pytest.mark.parametrize("shape", [{}, SD2], ids=["sd1", "sd2"])
def test_saved_updates_make_an_ordinary_model_that_predicts_the_same(tmp_path, shape):
    one = tuner(inflated(**shape), steps=3)
    one.fit(MEAN, DEVIATION, CAPTION)
    one.unet.save_tuned(tmp_path / "tuned", one.config.trainable)
    assert load_file(tmp_path / "tuned/tuned.safetensors").keys() == one.parameters.keys()
    assert json.loads((tmp_path / "tuned/tuned.json").read_text())["lora_rank"] == 3
    loaded = inflated(seed=5, **shape)  # The first weights of its temporal attention do not matter.
    loaded.load_tuned(tmp_path / "tuned")
    assert loaded.state_dict().keys() == inflated(**shape).state_dict().keys()
    assert relative(prediction(loaded), prediction(one.unet.eval())) < 1e-4
    assert relative(prediction(loaded), prediction(inflated(**shape))) > 1e-3
    with pytest.raises(TavError, match="has low-rank updates already; load the base model again"):
        loaded.load_tuned(tmp_path / "tuned")


def test_half_precision_rounds_the_sum_once(tmp_path):
    one = tuner(steps=1)
    one.fit(MEAN, DEVIATION, CAPTION)
    one.unet.save_tuned(tmp_path, one.config.trainable)
    whole, half = inflated(), inflated().half()
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    update = load_file(tmp_path / "tuned.safetensors")
    expected = half.get_submodule(name).weight.float() + update[f"{name}.lora_up"] @ update[f"{name}.lora_down"]
    half.load_tuned(tmp_path)
    whole.load_tuned(tmp_path)
    assert torch.equal(half.get_submodule(name).weight, expected.half())


def test_a_model_in_the_original_layout_has_the_updates(tmp_path):
    one = tuner(steps=2)
    one.fit(MEAN, DEVIATION, CAPTION)
    one.unet.save_tuned(tmp_path / "tuned", one.config.trainable)
    loaded = inflated()
    loaded.load_tuned(tmp_path / "tuned")
    save_original(loaded, tmp_path / "original")
    assert torch.equal(prediction(load_original(tmp_path / "original")), prediction(loaded))


def test_resumed_tuning_is_bit_identical(tmp_path):
    whole = tuner()
    whole.fit(MEAN, DEVIATION, CAPTION)

    checkpoints = Checkpoints(tmp_path, "one")
    stop_after(2, tuner(), (MEAN, DEVIATION, CAPTION), checkpoints)
    resumed = tuner(inflated(seed=9))
    resumed.fit(MEAN, DEVIATION, CAPTION, checkpoints)
    assert len(resumed.history) == 4
    assert all(torch.equal(value, whole.parameters[name]) for name, value in resumed.parameters.items())


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_updates_stay_in_float32_in_half_precision(precision):
    one = tuner(steps=1, precision=precision)
    one.fit(MEAN, DEVIATION, CAPTION)
    assert {value.dtype for value in one.parameters.values()} == {torch.float32}
    assert one.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.weight.dtype != torch.float32


def test_updates_of_stable_diffusion_1_5_at_rank_16_are_at_most_12_megabytes():
    with torch.device("meta"):
        unet = UNet3DConditionModel(cross_attention_dim=768)
    shapes = update_shapes(unet, unet.trainable_parameters(), 16)
    numbers = sum(a * b for a, b in shapes.values())
    assert numbers == 2_396_160
    header = sum(len(name) + 80 for name in shapes)  # of the file: at most so many bytes
    assert 4 * numbers + header < 12e6


@pytest.mark.parametrize("modules", [["conv_in"], ["norm1"], ["attn1.to_q", "ff", "norm3"]])
def test_layers_of_other_kinds_are_refused(modules):
    with pytest.raises(TavError, match=r"tune.trainable: .* is no linear layer, as tune.lora_rank needs"):
        tuner(trainable=tuple(modules))


def test_other_modules_and_no_temporal_attention():
    unet = UNet3DConditionModel.from_unet2d(image_unet(), temporal=False)
    parameters = add_low_rank(unet, unet.trainable_parameters(("attn2", "attn_temp", "ff")), 2, seeded(0))
    assert {name.split(".transformer_blocks.0.")[1].split(".")[0] for name in parameters} == {"attn2", "ff"}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"lora_rank": 4}, r"lora_down is \(3, 8\) in the file, \(4, 8\)"),
        ({"lora_rank": "3"}, "must be a whole number"),
    ],
)
def test_updates_of_another_model_are_refused(tmp_path, change, error):
    one = tuner(steps=1)
    one.unet.save_tuned(tmp_path, one.config.trainable)
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    unet = inflated()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    with pytest.raises(TavError, match=error):
        unet.load_tuned(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_updates_are_not_read_as_weights_nor_weights_as_updates(tmp_path):
    one = tuner(steps=1)
    one.unet.save_tuned(tmp_path / "updates", one.config.trainable)
    video_unet().save_tuned(tmp_path / "weights")
    for folder, rank in (("updates", 0), ("weights", 3)):
        path = tmp_path / folder / "tuned.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_rank": rank}))
        with pytest.raises(TavError, match="is in only one of them"):
            inflated().load_tuned(tmp_path / folder)


def test_the_effect_of_a_style_survives_tuning(tmp_path: Path):
    """A LoRA that is fused into the base model changes the tuned model as it changed the base model."""
    plain = small_base(tmp_path / "plain")
    random_lora(tmp_path / "style.safetensors", {"unet": image_unet()}, size=0.1)
    make_base(tmp_path / "styled", str(plain), "plain", loras=[Lora(tmp_path / "style.safetensors", 0.5)])

    def predictions(base: Path) -> list[torch.Tensor]:
        torch.manual_seed(0)
        unet = UNet3DConditionModel.from_pretrained_2d(base)
        before = prediction(unet)
        one = tuner(unet, steps=6, learning_rate=1e-3)
        one.fit(MEAN, DEVIATION, CAPTION)
        tuned = base.with_name(f"{base.name}-tuned")
        from tav_model.base_models import base_digest

        unet.save_tuned(tuned, one.config.trainable, base_digest=base_digest(str(base)))
        loaded, _ = load_tuned_unet(str(base), tuned, ("first", "former"), True, "cpu", torch.float32)
        return [before, prediction(loaded)]

    (before, after), (styled_before, styled_after) = predictions(plain), predictions(tmp_path / "styled")
    assert relative(after, before) > 1e-3  # Tuning changed something.
    style, style_after = styled_before - before, styled_after - after
    assert relative(style_after, style) < 0.2
    assert torch.cosine_similarity(style.flatten(), style_after.flatten(), dim=0) > 0.98
