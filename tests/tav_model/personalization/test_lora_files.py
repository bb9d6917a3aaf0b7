"""LoRA files: every format gives the direct computation, and what does not fit is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tav_model import TavError
from tav_model.personalization.lora_files import Target, fuse, read_lora
from tests.support.models import image_unet, text_encoder
from tests.support.personalisation import FORMATS, random_lora


@pytest.fixture(scope="module")
def networks():
    return {"unet": image_unet(), "text_encoder": text_encoder()}


def check(updates, deltas, factor=1.0):
    assert {tuple(target) for target in updates} == deltas.keys()
    for target, update in updates.items():
        torch.testing.assert_close(update.delta(), factor * deltas[target].flatten(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("style", FORMATS)
def test_every_format_gives_the_product_of_its_matrices(networks, tmp_path: Path, style):
    path = tmp_path / "style.safetensors"
    deltas = random_lora(path, networks, style)
    assert any(network == "text_encoder" for network, _ in deltas)
    assert any(networks[network].get_submodule(name).weight.ndim == 4 for network, name in deltas)
    check(read_lora(path, networks), deltas)


@pytest.mark.parametrize("style", ["kohya", "peft"])
def test_alpha_divides_by_the_rank(networks, tmp_path, style):
    path = tmp_path / "style.safetensors"
    deltas = random_lora(path, networks, style, rank=4, alpha=1.0)
    check(read_lora(path, networks), deltas, 1 / 4)


def test_alpha_in_the_metadata_of_diffusers(networks, tmp_path):
    path = tmp_path / "style.safetensors"
    metadata = {
        "unet.r": 4,
        "unet.lora_alpha": 8,
        "unet.alpha_pattern": {"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 2},
        "text_encoder.lora_alpha": 2,
        "text_encoder.use_rslora": True,
    }
    deltas = random_lora(path, networks, "peft", rank=4, metadata=metadata)
    updates = read_lora(path, networks)
    assert {update.factor for target, update in updates.items() if target.network == "unet"} == {2.0, 0.5}
    assert {update.factor for target, update in updates.items() if target.network == "text_encoder"} == {1.0}
    check(updates, {key: updates[Target(*key)].factor * delta for key, delta in deltas.items()})


def test_alpha_in_the_config_beside_a_file_of_peft(networks, tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    deltas = random_lora(path, {"unet": networks["unet"]}, "bare peft", rank=4)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 6}))
    check(read_lora(path, networks), deltas, 6 / 4)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": "6"}))
    with pytest.raises(TavError, match="lora_alpha: '6' must be a number"):
        read_lora(path, networks)


def test_fusing_adds_the_scaled_update_to_the_weight(tmp_path):
    unet = image_unet()
    deltas = random_lora(tmp_path / "style.safetensors", {"unet": unet}, alpha=1.0)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    for target, update in read_lora(tmp_path / "style.safetensors", {"unet": unet}).items():
        fuse(unet, target.module, update, -0.3)
    for name, value in unet.state_dict().items():
        delta = deltas.get(("unet", name.removesuffix(".weight")), torch.zeros(()))
        torch.testing.assert_close(value, before[name] - 0.3 * 0.5 * delta)


def test_fusing_rounds_once_in_half_precision(tmp_path):
    unet = image_unet().half()
    deltas = random_lora(tmp_path / "style.safetensors", {"unet": unet}, size=1e-3)
    (target, update), *_ = read_lora(tmp_path / "style.safetensors", {"unet": unet}).items()
    before = unet.get_submodule(target.module).weight.clone()
    fuse(unet, target.module, update, 1.0)
    expected = (before.float() + update.delta().view(before.shape)).half()
    assert torch.equal(unet.get_submodule(target.module).weight, expected)
    assert not torch.equal(before, expected) and tuple(target) in deltas


FIRST = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda t: t.pop(f"{FIRST}.lora_up.weight"), "incomplete: .*attn1.to_q has no up matrix"),
        (lambda t: t.update({f"{FIRST}.lora_up.weight": torch.ones(9, 2)}), r"does not fit the base model's weight"),
        (lambda t: t.update({f"{FIRST}.lora_down.weight": torch.ones(3, 8)}), r"does not fit the base model's weight"),
        (
            lambda t: t.update(
                {f"{FIRST}.lora_down.weight": torch.ones(0, 8), f"{FIRST}.lora_up.weight": torch.ones(8, 0)}
            ),
            r"does not fit the base model's weight",
        ),
        (lambda t: t.update({f"{FIRST}.lora_down.weight": torch.full((2, 8), math.nan)}), "values that are not finite"),
        (lambda t: t.update({f"{FIRST}.alpha": torch.ones(2)}), "alpha must be one number"),
        (lambda t: t.update({"lora_unet_x.lora_up.weight": torch.ones(2)}), "no module lora_unet_x; a LoRA of another"),
        (lambda t: t.update({"lora_te2_x.lora_up.weight": torch.ones(2)}), "a LoRA of Stable Diffusion XL; only"),
        (lambda t: t.update({"lora_unet_x.hada_w1_a": torch.ones(2)}), "LoHa, which is not supported; allowed: LoRA"),
        (lambda t: t.update({"lora_unet_x.lokr_w1": torch.ones(2)}), "LoKr, which is not supported"),
        (lambda t: t.update({f"{FIRST}.dora_scale": torch.ones(2)}), "DoRA, which is not supported"),
        (lambda t: t.update({f"{FIRST}.bias": torch.ones(2)}), "is no part of a LoRA; allowed"),
        (lambda t: t.update({"model.diffusion_model.x": torch.ones(2)}), "for a checkpoint, use --single-file"),
        (lambda t: t.clear(), "has no tensors"),
    ],
)
def test_files_that_do_not_fit_are_refused_in_one_line(networks, tmp_path, change, error):
    path = tmp_path / "style.safetensors"
    random_lora(path, networks)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(TavError, match=error) as refused:
        read_lora(path, networks)
    assert str(refused.value).startswith(str(path)) and "\n" not in str(refused.value)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt", ".PT"])
def test_pickles_are_refused_unread_with_a_way_out(networks, tmp_path, suffix):
    path = tmp_path / f"style{suffix}"
    with pytest.raises(TavError, match=r"may run code .* only \.safetensors are allowed: download that version, or"):
        read_lora(path, networks)


def test_a_damaged_file_is_refused(networks, tmp_path):
    path = tmp_path / "style.safetensors"
    random_lora(path, networks)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(TavError, match="not a complete safetensors file"):
        read_lora(path, networks)


@pytest.mark.parametrize("metadata", [{"unet.use_dora": True}, {"use_dora": True}, ["r"]])
def test_metadata_of_other_kinds_is_refused(networks, tmp_path, metadata):
    path = tmp_path / "style.safetensors"
    random_lora(path, networks, "peft", metadata=metadata)
    with pytest.raises(TavError, match="its metadata"):
        read_lora(path, networks)
