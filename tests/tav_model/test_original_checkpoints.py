"""Checkpoints in the original code's layout: there and back, and nothing in them is ever executed."""

import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tav_model import TavError
from tav_model.original_checkpoints import load_original, save_original
from tests.support.models import CONTEXT_DIM, SD2, noise, relative, video_unet

WEIGHTS = "diffusion_pytorch_model"
# What the original's `config.json` has, and no more.
ORIGINAL_OPTIONS = {
    "sample_size",
    "in_channels",
    "out_channels",
    "center_input_sample",
    "flip_sin_to_cos",
    "freq_shift",
    "down_block_types",
    "mid_block_type",
    "up_block_types",
    "only_cross_attention",
    "block_out_channels",
    "layers_per_block",
    "downsample_padding",
    "mid_block_scale_factor",
    "act_fn",
    "norm_num_groups",
    "norm_eps",
    "cross_attention_dim",
    "attention_head_dim",
    "dual_cross_attention",
    "use_linear_projection",
    "class_embed_type",
    "num_class_embeds",
    "upcast_attention",
    "resnet_time_scale_shift",
}


@pytest.mark.parametrize("safetensors", [False, True], ids=["bin", "safetensors"])
@pytest.mark.parametrize("shape", [{}, SD2], ids=["sd1", "sd2"])
def test_there_and_back(tmp_path, safetensors, shape):
    unet = video_unet(**shape)
    save_original(unet, tmp_path, safetensors=safetensors)
    loaded = load_original(tmp_path)
    sample, text = noise(1, 4, 3, 8, 8), noise(1, 7, CONTEXT_DIM)
    assert loaded.state_dict().keys() == unet.state_dict().keys()
    assert all(torch.equal(value, unet.state_dict()[name]) for name, value in loaded.state_dict().items())
    with torch.no_grad():
        assert relative(loaded(sample, 500, text).sample, unet(sample, 500, text).sample) < 1e-5


def test_loaded_as_any_attention(tmp_path):
    save_original(video_unet(), tmp_path)
    loaded = load_original(tmp_path, attention=("self",), temporal=False)
    assert (tuple(loaded.config.attention), loaded.config.temporal) == (("self",), False)


def test_loaded_model_can_be_tuned_and_saved(tmp_path):
    save_original(video_unet(), tmp_path / "original")
    unet = load_original(tmp_path / "original")
    unet.save_tuned(tmp_path / "tuned")
    video_unet(seed=1).load_tuned(tmp_path / "tuned")


def test_config_is_the_originals(tmp_path):
    save_original(video_unet(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "UNet3DConditionModel"
    assert config["down_block_types"] == ["CrossAttnDownBlock3D", "DownBlock3D"]
    assert {key for key in config if not key.startswith("_")} <= ORIGINAL_OPTIONS


def test_config_written_by_the_original_with_its_own_options_is_read(tmp_path):
    save_original(video_unet(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"only_cross_attention": False, "dual_cross_attention": False, "class_embed_type": None}
    config |= {"num_class_embeds": None, "_name_or_path": "./checkpoints/stable-diffusion-v1-4/unet"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    load_original(tmp_path)


def test_later_file_of_the_other_kind_replaces_the_first(tmp_path):
    for seed, safetensors in ((1, True), (2, False), (3, True)):
        unet = video_unet(seed=seed)
        save_original(unet, tmp_path, safetensors=safetensors)
        for name, value in load_original(tmp_path).state_dict().items():
            assert torch.equal(value, unet.state_dict()[name])


@pytest.mark.parametrize(
    "unet",
    [
        {"attention": ("self",)},
        {"temporal": False},
        {"transformer_layers_per_block": 2},
        {"layers_per_block": [1, 2]},
        {"dropout": 0.1},
    ],
    ids=str,
)
def test_what_the_original_does_not_have_is_not_written(tmp_path, unet):
    with pytest.raises(TavError, match=r"\Athe original code has .*\Z"):
        save_original(video_unet(**unet), tmp_path)
    assert list(tmp_path.iterdir()) == []


# Refusals


class Bomb:
    """Unpickled, it writes a file: what a hostile checkpoint could do."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return (open, (self.mark, "w"))


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}))


def change_weights(folder, change):
    weights = torch.load(folder / f"{WEIGHTS}.bin", weights_only=True)
    change(weights)
    torch.save(weights, folder / f"{WEIGHTS}.bin")


A_NAME = "mid_block.attentions.0.transformer_blocks.0.attn_temp.to_q.weight"
DAMAGES = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no weights": lambda folder: (folder / f"{WEIGHTS}.bin").unlink(),
    "config is not JSON": lambda folder: (folder / "config.json").write_text("unet:"),
    "config of something else": lambda folder: (folder / "config.json").write_text('{"model_type": "clip"}'),
    "config without blocks": lambda folder: change_config(folder, down_block_types="gone"),
    "config with too few blocks": lambda folder: change_config(folder, down_block_types=["DownBlock3D"]),
    "config with unknown blocks": lambda folder: change_config(folder, mid_block_type="UNetMidBlock3DNew"),
    "config with a number for a list": lambda folder: change_config(folder, block_out_channels=8),
    "config with a text for a number": lambda folder: change_config(folder, norm_num_groups="four"),
    "config of another shape": lambda folder: change_config(folder, cross_attention_dim=16),
    "pickled code for weights": lambda folder: torch.save(Bomb(folder / "exploded"), folder / f"{WEIGHTS}.bin"),
    "pickled code beside weights": lambda folder: change_weights(
        folder, lambda weights: weights.update(bomb=Bomb(folder / "exploded"))
    ),
    "plainly pickled code": lambda folder: (folder / f"{WEIGHTS}.bin").write_bytes(
        pickle.dumps(Bomb(folder / "exploded"), protocol=2)
    ),
    "truncated": lambda folder: (folder / f"{WEIGHTS}.bin").write_bytes(
        (folder / f"{WEIGHTS}.bin").read_bytes()[:-200]
    ),
    "empty": lambda folder: (folder / f"{WEIGHTS}.bin").write_bytes(b""),
    "a folder for weights": lambda folder: (
        (folder / f"{WEIGHTS}.bin").unlink(),
        (folder / f"{WEIGHTS}.bin").mkdir(),
    ),
    "a list of tensors": lambda folder: torch.save([torch.ones(1)], folder / f"{WEIGHTS}.bin"),
    "a number for a tensor": lambda folder: change_weights(folder, lambda weights: weights.update({A_NAME: 1})),
    "a number for a name": lambda folder: change_weights(folder, lambda weights: weights.update({1: torch.ones(1)})),
    "an image model": lambda folder: change_weights(folder, lambda weights: weights.pop(A_NAME)),
    "a surplus name": lambda folder: change_weights(folder, lambda weights: weights.update(surplus=torch.ones(1))),
    "another shape": lambda folder: change_weights(folder, lambda weights: weights.update({A_NAME: torch.ones(2)})),
    "NaN": lambda folder: change_weights(folder, lambda weights: weights[A_NAME].fill_(torch.nan)),
    "truncated safetensors": lambda folder: (folder / f"{WEIGHTS}.safetensors").write_bytes(b"\x08\0\0\0"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_refused_in_one_line_and_nothing_is_executed(tmp_path, damage):
    save_original(video_unet(), tmp_path)
    DAMAGES[damage](tmp_path)
    with pytest.raises(TavError) as error:
        load_original(tmp_path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(tmp_path))
    assert not (tmp_path / "exploded").exists()


def test_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(TavError, match="nowhere"):
        load_original(tmp_path / "nowhere")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    save_original(video_unet(), folder)
    return folder


@settings(max_examples=60)
@given(data=st.binary(max_size=200) | st.binary(max_size=50).map(lambda rest: b"\x80\x02" + rest))
def test_any_bytes_for_weights_are_refused(saved, data):
    (saved / f"{WEIGHTS}.bin").write_bytes(data)
    with pytest.raises(TavError):
        load_original(saved)
