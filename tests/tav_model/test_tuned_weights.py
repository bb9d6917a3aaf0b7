"""Tuned weights alone: what is saved, that they come back, and everything that is refused, leaving the model as it was."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file

from tav_model import TavError
from tav_model.tensors import load_tensors, save_tensors
from tests.support.models import CONTEXT_DIM, SD2, noise, video_unet


def state(unet):
    return {name: value.clone() for name, value in unet.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def tuned_unet(**changes):
    """A model whose trained weights are other than those of `video_unet()`."""
    unet = video_unet(**changes)
    for parameter in unet.trainable_parameters().values():
        parameter.data += 0.1
    return unet


@pytest.fixture
def folder(tmp_path):
    tuned_unet().save_tuned(tmp_path / "tuned", steps=3)
    return tmp_path / "tuned"


@pytest.mark.parametrize("shape", [{}, SD2, {"temporal": False}, {"attention": ("self", "all")}], ids=str)
def test_tuned_weights_come_back(tmp_path, shape):
    tuned, base = tuned_unet(**shape), video_unet(**shape)
    assert not same(state(base), state(tuned))
    tuned.save_tuned(tmp_path)
    base.load_tuned(tmp_path)
    assert same(state(base), state(tuned))


def test_loaded_model_predicts_the_same(tmp_path):
    sample, text = noise(1, 4, 3, 8, 8), noise(1, 7, CONTEXT_DIM)
    tuned, base = tuned_unet(), video_unet()
    tuned.save_tuned(tmp_path)
    base.load_tuned(tmp_path)
    with torch.no_grad():
        assert torch.equal(base(sample, 500, text).sample, tuned(sample, 500, text).sample)


def test_only_trained_weights_and_the_norms_before_them_are_saved(folder):
    names = load_file(folder / "tuned.safetensors").keys()
    unet = video_unet()
    norms = {name for name in unet.state_dict() if ".norm_temp." in name}
    assert names == unet.trainable_parameters().keys() | norms


def test_other_choice_of_trained_modules_comes_back(tmp_path):
    tuned_unet().save_tuned(tmp_path, modules=["attn1.to_q"])
    unet = video_unet()
    before = state(unet)
    unet.load_tuned(tmp_path)
    changed = {name for name, value in state(unet).items() if not torch.equal(value, before[name])}
    assert changed == unet.trainable_parameters(["attn1.to_q"]).keys()


def test_json_says_what_they_are(folder):
    info = json.loads((folder / "tuned.json").read_text())
    assert info["attention"] == {"spatial": ["first", "former"], "temporal": True}
    assert info["trainable_modules"] == ["attn1.to_q", "attn2.to_q", "attn_temp"]
    assert info["steps"] == 3
    tensors = load_file(folder / "tuned.safetensors")
    assert info["parameters"] == sum(value.numel() for value in tensors.values())
    assert info["sha256"] == hashlib.sha256((folder / "tuned.safetensors").read_bytes()).hexdigest()
    assert video_unet().load_tuned(folder) == info


def test_same_weights_are_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        tuned_unet().save_tuned(tmp_path / name)
    for file in ("tuned.safetensors", "tuned.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_model_in_half_precision_takes_them_in_its_own(folder, dtype):
    unet = video_unet().to(dtype)
    unet.load_tuned(folder)
    assert {parameter.dtype for parameter in unet.parameters()} == {dtype}
    assert same(state(unet), state(tuned_unet().to(dtype)))


# Refusals


def rewrite(folder, change):
    """Change the weights, and the JSON with them, as somebody would who knows the layout."""
    tensors, metadata = load_tensors(folder / "tuned.safetensors")
    change(tensors)
    save_tensors(folder / "tuned.safetensors", tensors, metadata)
    describe(folder, sha256=hashlib.sha256((folder / "tuned.safetensors").read_bytes()).hexdigest())


def describe(folder, **changes):
    info = json.loads((folder / "tuned.json").read_text())
    (folder / "tuned.json").write_text(json.dumps(info | changes))


A_NAME = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"


def spoil(tensors, value):
    tensors[A_NAME][0, 0] = value


DAMAGES = {
    "no folder": lambda folder: folder.rename(folder.with_name("elsewhere")),
    "no weights": lambda folder: (folder / "tuned.safetensors").unlink(),
    "no JSON": lambda folder: (folder / "tuned.json").unlink(),
    "JSON is a folder": lambda folder: ((folder / "tuned.json").unlink(), (folder / "tuned.json").mkdir()),
    "truncated weights": lambda folder: (folder / "tuned.safetensors").write_bytes(
        (folder / "tuned.safetensors").read_bytes()[:-1]
    ),
    "a bit of the weights": lambda folder: (folder / "tuned.safetensors").write_bytes(
        (folder / "tuned.safetensors").read_bytes()[:-1] + b"\x7f"
    ),
    "not tensors": lambda folder: (folder / "tuned.safetensors").write_bytes(b"pickled"),
    "not JSON": lambda folder: (folder / "tuned.json").write_text("{"),
    "not text": lambda folder: (folder / "tuned.json").write_bytes(b"\xff\xfe"),
    "JSON of something else": lambda folder: (folder / "tuned.json").write_text("[1, 2]"),
    "JSON without a key": lambda folder: (folder / "tuned.json").write_text('{"sha256": "0", "attention": {}}'),
    "other weights": lambda folder: (
        tuned_unet(seed=1).save_tuned(folder, modules=["attn1.to_q"]) or describe(folder, sha256="0" * 64)
    ),
    "other attention": lambda folder: describe(folder, attention={"spatial": ["first"], "temporal": True}),
    "other temporal": lambda folder: describe(folder, attention={"spatial": ["first", "former"], "temporal": False}),
    "unknown modules": lambda folder: describe(folder, trainable_modules=["attn9"]),
    "modules that are no list": lambda folder: describe(folder, trainable_modules=3),
    "modules that are no names": lambda folder: describe(folder, trainable_modules=[3]),
    "a missing name": lambda folder: rewrite(folder, lambda tensors: tensors.pop(A_NAME)),
    "a surplus name": lambda folder: rewrite(folder, lambda tensors: tensors.update(surplus=torch.ones(1))),
    "another shape": lambda folder: rewrite(folder, lambda tensors: tensors.update({A_NAME: torch.ones(1, 2)})),
    "NaN": lambda folder: rewrite(folder, lambda tensors: spoil(tensors, torch.nan)),
    "infinity": lambda folder: rewrite(folder, lambda tensors: spoil(tensors, -torch.inf)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_refused_in_one_line_and_the_model_is_as_it_was(folder, damage):
    DAMAGES[damage](folder)
    unet = video_unet()
    before = state(unet)
    with pytest.raises(TavError) as error:
        unet.load_tuned(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value) or "trainable" in str(error.value)
    assert same(state(unet), before)


@pytest.mark.parametrize(
    "other",
    [{"block_out_channels": (16, 16)}, {"layers_per_block": 2}, {"attention": ("self",)}, {"temporal": False}],
    ids=str,
)
def test_weights_of_another_model_are_refused(folder, other):
    unet = video_unet(**other)
    before = state(unet)
    with pytest.raises(TavError, match=r"\A.*tuned.*\Z"):
        unet.load_tuned(folder)
    assert same(state(unet), before)


def test_run_killed_between_the_two_files_leaves_no_weights_under_the_wrong_description(folder, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tav_model.tuned_weights.write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        tuned_unet(seed=1).save_tuned(folder)
    with pytest.raises(TavError, match="sha256"):
        video_unet().load_tuned(folder)


# What is trained


def test_trainable_parameters_are_chosen_by_the_end_of_a_modules_name():
    unet = video_unet()
    chosen = unet.trainable_parameters(["attn1.to_q"])
    assert chosen and all(name.endswith("attn1.to_q.weight") for name in chosen)
    assert all(value is dict(unet.named_parameters())[name] for name, value in chosen.items())


def test_trainable_parameters_come_in_one_order():
    names = list(video_unet().trainable_parameters(["attn_temp", "attn1.to_q"]))
    assert names == list(video_unet().trainable_parameters(["attn1.to_q", "attn_temp"]))


def test_without_temporal_attention_only_queries_are_trained():
    names = video_unet(temporal=False).trainable_parameters()
    assert names and all(name.endswith(".to_q.weight") for name in names)


@pytest.mark.parametrize("modules", [["attn1.to_x"], ["ttn1.to_q"], [], ["attn1.to_q", ""]], ids=str)
def test_trainable_modules_that_are_not_there_are_refused(modules):
    with pytest.raises(TavError, match=r"\Atrainable: .*\Z"):
        video_unet().trainable_parameters(modules)


def test_temporal_attention_alone_cannot_be_trained_where_it_is_off():
    with pytest.raises(TavError, match="attn_temp"):
        video_unet(temporal=False).trainable_parameters(["attn_temp"])
