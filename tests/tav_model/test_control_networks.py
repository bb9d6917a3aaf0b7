"""Control networks: published folders load, others are named, and so are networks of other base models."""

import copy
import json
import shutil
import warnings

import psutil
import pytest
import torch
from diffusers import ControlNetModel, MultiControlNetModel, T2IAdapter

from tav_model import TavError, load_control_network
from tav_model.control_networks import check_control_network, check_fits, control_networks
from tests.support.models import CONTEXT_DIM, SD2, controlnet, pipeline, small_base, t2i_adapter, video_unet

# What the configs of published ControlNets of Stable Diffusion 1.5 have (lllyasviel/control_v11p_sd15_canny), besides
# sizes: written by diffusers 0.16, they lack the keys that came later.
PUBLISHED_CONTROLNET = {
    "_class_name": "ControlNetModel",
    "_diffusers_version": "0.16.0.dev0",
    "_name_or_path": "/home/someone/controlnet_1_1/control_v11p_sd15_canny",
    "act_fn": "silu",
    "class_embed_type": None,
    "controlnet_conditioning_channel_order": "rgb",
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None,
    "resnet_time_scale_shift": "default",
    "upcast_attention": False,
    "use_linear_projection": False,
}
SMALL = {
    "attention_head_dim": 2,
    "block_out_channels": [8, 16],
    "conditioning_embedding_out_channels": [4, 8],
    "cross_attention_dim": CONTEXT_DIM,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
FULL_SIZE = {
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "conditioning_embedding_out_channels": [16, 32, 96, 256],
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
PUBLISHED_ADAPTER = {
    "_class_name": "T2IAdapter",
    "_diffusers_version": "0.16.1",
    "adapter_type": "full_adapter",
    "channels": [8, 16],
    "downscale_factor": 2,
    "in_channels": 3,
    "num_res_blocks": 1,
}


def write_published(folder, network, config, form):
    """Write weights as published: `.safetensors`, `.bin`, or both, with a half-precision copy beside them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if form in ("safetensors", "both"):
            network.save_pretrained(folder)
        if form in ("bin", "both"):
            network.save_pretrained(folder, safe_serialization=False)
        if form == "both":
            copy.deepcopy(network).half().save_pretrained(folder, variant="fp16")
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "README.md").write_text("# A control network\n")
    (folder / "images").mkdir(exist_ok=True)
    return folder


@pytest.mark.parametrize("form", ["safetensors", "bin", "both"])
@pytest.mark.parametrize("kind", ["controlnet", "adapter"])
def test_published_folders_load(tmp_path, kind, form):
    made, config = {
        "controlnet": (controlnet(), PUBLISHED_CONTROLNET | SMALL),
        "adapter": (t2i_adapter(), PUBLISHED_ADAPTER),
    }[kind]
    loaded = load_control_network(write_published(tmp_path, made, config, form))
    assert type(loaded) is type(made) and not loaded.training
    expected = made.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    pipeline(controlnet=loaded)


def test_half_precision_and_subfolders(tmp_path):
    write_published(tmp_path / "canny", controlnet(), PUBLISHED_CONTROLNET | SMALL, "both")
    assert (
        load_control_network(tmp_path, subfolder="canny", variant="fp16", torch_dtype=torch.float16).dtype
        == torch.float16
    )


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.full_size
def test_a_controlnet_of_stable_diffusion_1_5_in_full_size_loads(tmp_path):
    memory, disk = psutil.virtual_memory().available / 2**30, shutil.disk_usage(tmp_path).free / 2**30
    if memory < 5 or disk < 3:
        pytest.skip(f"needs 5 GiB of free memory and 3 of disk; here are {memory:.1f} and {disk:.1f}")
    sizes = {key: value for key, value in FULL_SIZE.items() if key != "conditioning_embedding_out_channels"}
    with torch.device("meta"):
        network = ControlNetModel(**sizes)
    network = network.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(0.01)
    try:
        write_published(tmp_path, network, PUBLISHED_CONTROLNET | FULL_SIZE, "safetensors")
        del network
        loaded = load_control_network(tmp_path)
        assert round(sum(parameter.numel() for parameter in loaded.parameters()) / 1e6) == 361
        text, picture = torch.zeros(1, 77, 768), torch.zeros(1, 3, 128, 128)
        with torch.no_grad():
            down, mid = loaded(torch.zeros(1, 4, 16, 16), 1, text, picture, return_dict=False)
        assert [len(one[0]) for one in down] == [320] * 4 + [640] * 3 + [1280] * 5 and mid.shape == (1, 1280, 2, 2)
        with torch.device("meta"):
            adapter = T2IAdapter()
        for one in (loaded, adapter):
            check_fits(one, video_unet_of_full_size(), 8)
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)


def video_unet_of_full_size():
    from tav_model import UNet3DConditionModel

    with torch.device("meta"):
        return UNet3DConditionModel(
            block_out_channels=(320, 640, 1280, 1280), layers_per_block=2, cross_attention_dim=768
        )


# Folders that are none


def test_a_missing_folder_is_named():
    with pytest.raises(TavError, match=r"\Amodels/canny: no such folder, and no such control network on the hub .*\Z"):
        load_control_network("models/canny")


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(TavError, match=r"no control network \(config.json"):
        load_control_network(tmp_path)


@pytest.mark.parametrize("config", [{}, [1], {"_class_name": "UNet2DConditionModel"}])
def test_another_config_is_refused(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TavError, match=str(tmp_path)) as error:
        load_control_network(tmp_path)
    assert "\n" not in str(error.value)


DAMAGE = {
    "truncated": (lambda path, _: path.write_bytes(path.read_bytes()[:-10]), "safetensors"),
    "no weights": (lambda path, _: path.unlink(), "no ControlNetModel can be loaded"),
    "a missing weight": (lambda path, tensors: save(path, dict(list(tensors.items())[1:])), "no weights for"),
    "a surplus weight": (
        lambda path, tensors: save(path, tensors | {"extra": torch.zeros(2)}),
        "weights of another model",
    ),
    "a NaN": (
        lambda path, tensors: save(path, tensors | {"conv_in.bias": tensors["conv_in.bias"] * float("nan")}),
        "not finite",
    ),
}


def save(path, tensors):
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_weights_are_one_line(tmp_path, case):
    from safetensors.torch import load_file

    damage, message = DAMAGE[case]
    controlnet().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    damage(path, {name: tensor.clone() for name, tensor in load_file(path).items()})
    with pytest.raises(TavError, match=message) as error:
        load_control_network(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


# Networks of other base models

OTHERS = {
    "text of another width": (lambda: controlnet(cross_attention_dim=16), "cross_attention_dim is"),
    "other widths": (lambda: controlnet(block_out_channels=(8, 8)), r"block_out_channels is \(8, 8\), not \(8, 16\)"),
    "more layers": (lambda: controlnet(layers_per_block=2), "layers_per_block"),
    "other latents": (lambda: controlnet(in_channels=16), "in_channels is 16, not 4"),
    "another VAE": (
        lambda: controlnet(conditioning_embedding_out_channels=(4, 8, 8, 8)),
        "pixels for each of the latents is 8, not 2",
    ),
    "an adapter of other widths": (lambda: t2i_adapter(channels=[8, 8]), r"channels is \(8, 8\), not \(8, 16\)"),
    "a light adapter": (lambda: t2i_adapter(adapter_type="light_adapter"), "channels is"),
    "an adapter of another VAE": (
        lambda: t2i_adapter(downscale_factor=8),
        "pixels for each of the latents is 8, not 2",
    ),
    "an adapter of XL": (lambda: t2i_adapter(adapter_type="full_adapter_xl"), "Stable Diffusion XL"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_network_of_another_base_model_is_named(case):
    make, message = OTHERS[case]
    for network in (make(), [controlnet(), make()]):
        with pytest.raises(TavError, match=message) as error:
            pipeline(controlnet=network)
        assert "\n" not in str(error.value)


def test_configs_alone_tell_whether_a_network_fits(tmp_path):
    base = small_base(tmp_path / "base")
    networks = {
        "controlnet": controlnet(conditioning_embedding_out_channels=(4, 8, 8, 8)),
        "adapter": t2i_adapter(downscale_factor=8),
        "coarse": controlnet(),
        "wide": controlnet(block_out_channels=(16, 16), conditioning_embedding_out_channels=(4, 8, 8, 8)),
    }
    for name, network in networks.items():
        network.save_pretrained(tmp_path / name)
        for weights in (tmp_path / name).glob("*.safetensors"):
            weights.unlink()
    check_control_network(tmp_path / "controlnet", base)
    check_control_network(tmp_path / "adapter", base)
    for name, reason in (("coarse", "pixels for each of the latents is 2, not 8"), ("wide", "block_out_channels is")):
        with pytest.raises(
            TavError, match=rf"/{name}: the control network was made for another base model: .*{reason}"
        ):
            check_control_network(tmp_path / name, base)
    with pytest.raises(TavError, match=r"/controlnet: cannot be compared with the base model"):
        check_control_network(tmp_path / "controlnet", tmp_path / "base/vae/unet")


def test_a_network_of_stable_diffusion_2_fits_one():
    check_fits(controlnet(**SD2 | {"attention_head_dim": 2}), video_unet(**SD2), 2)


def test_a_list_is_a_multi_controlnet():
    first, second = controlnet(), t2i_adapter()
    assert control_networks(MultiControlNetModel([first, second])) == [first, second]
    assert control_networks(first) == [first]
    assert isinstance(pipeline(controlnet=[first, second]).controlnet, MultiControlNetModel)


@pytest.mark.parametrize("network", [[], [torch.nn.Linear(1, 1)], torch.nn.Linear(1, 1)])
def test_what_is_no_control_network_is_refused(network):
    with pytest.raises(ValueError, match=r"\Acontrolnet: "):
        control_networks(network)
