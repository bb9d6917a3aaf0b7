"""Single-file checkpoints: every weight arrives where it belongs, and others are refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from tav_model import TavError
from tav_model.personalization.single_file import load_single_file
from tests.support.models import SD2, image_unet, image_vae, text_encoder
from tests.support.personalisation import single_file


def networks(seed, **shape):
    return {
        "unet": image_unet(seed, **shape),
        "vae": image_vae(seed, block_out_channels=(4, 8, 8, 8)),
        "text_encoder": text_encoder(seed),
    }


def same(one, other):
    others = other.state_dict()
    return all(torch.equal(value, others[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("shape", [{}, SD2, {"block_out_channels": (8, 16, 16), "layers_per_block": 2}], ids=str)
def test_every_weight_arrives(tmp_path, shape):
    ours, theirs = networks(0, **shape), networks(1, **shape)
    path = single_file(tmp_path / "dream.safetensors", *theirs.values())
    assert not any(same(ours[part], theirs[part]) for part in ours)
    assert load_single_file(path, ours) == dict.fromkeys(ours, torch.float32)
    assert all(same(ours[part], theirs[part]) for part in ours)


def test_parts_that_the_file_lacks_stay_the_base_models(tmp_path):
    ours, theirs = networks(0), networks(1)
    path = single_file(tmp_path / "dream.safetensors", theirs["unet"].half())
    assert load_single_file(path, ours) == {"unet": torch.float16}
    assert same(ours["unet"], theirs["unet"].float())
    assert same(ours["vae"], networks(0)["vae"]) and same(ours["text_encoder"], networks(0)["text_encoder"])


def test_an_open_clip_text_encoder_arrives(tmp_path):
    ours, theirs = networks(0), networks(1)
    path = single_file(tmp_path / "dream.safetensors", theirs["unet"])
    tensors = load_file(path)
    prefix = "cond_stage_model.model."
    own = {name.removeprefix("text_model."): value for name, value in theirs["text_encoder"].state_dict().items()}
    layer, block = "encoder.layers.0.", f"{prefix}transformer.resblocks.0."
    tensors |= {
        f"{prefix}token_embedding.weight": own["embeddings.token_embedding.weight"],
        f"{prefix}positional_embedding": own["embeddings.position_embedding.weight"],
        f"{prefix}text_projection": torch.eye(12),
        f"{prefix}logit_scale": torch.ones(()),
    }
    for kind in ("weight", "bias"):
        tensors |= {
            f"{prefix}ln_final.{kind}": own[f"final_layer_norm.{kind}"],
            f"{block}ln_1.{kind}": own[f"{layer}layer_norm1.{kind}"],
            f"{block}ln_2.{kind}": own[f"{layer}layer_norm2.{kind}"],
            f"{block}mlp.c_fc.{kind}": own[f"{layer}mlp.fc1.{kind}"],
            f"{block}mlp.c_proj.{kind}": own[f"{layer}mlp.fc2.{kind}"],
            f"{block}attn.out_proj.{kind}": own[f"{layer}self_attn.out_proj.{kind}"],
            f"{block}attn.in_proj_{kind}": torch.cat([own[f"{layer}self_attn.{x}_proj.{kind}"] for x in "qkv"]),
        }
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    assert load_single_file(path, ours).keys() == {"unet", "text_encoder"}
    assert same(ours["text_encoder"], theirs["text_encoder"])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda t: t.pop("model.diffusion_model.out.2.bias"), "its unet does not fit: conv_out.bias is in only one of"),
        (
            lambda t: t.update({"model.diffusion_model.out.2.bias": torch.ones(5)}),
            r"conv_out.bias is \(5,\), in the base model \(4,\); --from must be a base model of the same architecture",
        ),
        (lambda t: t.pop("first_stage_model.encoder.conv_in.bias"), "its vae does not fit"),
        (lambda t: t.pop("cond_stage_model.transformer.text_model.final_layer_norm.bias"), "its text_encoder does not"),
        (lambda t: t.update({"conditioner.embedders.1.x": torch.ones(1)}), "a checkpoint of Stable Diffusion XL"),
        (lambda t: (t.clear(), t.update({"x.lora_up.weight": torch.ones(1)})), "for a LoRA, use --lora"),
        (lambda t: (t.clear(), t.update({"x": torch.ones(1)})), "not a Stable Diffusion checkpoint: nothing in it"),
    ],
)
def test_other_checkpoints_are_refused_in_one_line(tmp_path, change, error):
    path = single_file(tmp_path / "dream.safetensors", *networks(1).values())
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(TavError, match=error) as refused:
        load_single_file(path, networks(0))
    assert str(refused.value).startswith(str(path)) and "\n" not in str(refused.value)


def test_checkpoint_of_another_architecture_is_refused(tmp_path):
    path = single_file(tmp_path / "dream.safetensors", image_unet(block_out_channels=(8, 16, 16)))
    with pytest.raises(TavError, match=r"unet (does not fit|cannot be converted)"):
        load_single_file(path, networks(0))
