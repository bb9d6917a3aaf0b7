"""An inflated image UNet does what the image UNet does, on every frame; what cannot be inflated is refused."""

import shutil
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from tav_model import TavError, UNet3DConditionModel
from tests.support.models import CONTEXT_DIM, image_unet, noise, relative, video_unet


@st.composite
def image_configs(draw) -> dict[str, Any]:
    """Image UNets of Stable Diffusion's kinds, of 2 to 4 levels, as arguments of `image_unet`."""
    levels = draw(st.integers(2, 4))
    one_layer_count = st.integers(1, 3)
    return {
        "seed": draw(st.integers(0, 9)),
        "block_out_channels": draw(st.lists(st.sampled_from([8, 16]), min_size=levels, max_size=levels)),
        "layers_per_block": draw(one_layer_count | st.lists(one_layer_count, min_size=levels, max_size=levels)),
        "resnet_time_scale_shift": draw(st.sampled_from(["default", "scale_shift"])),
        "downsample_padding": draw(st.sampled_from([0, 1])),
        "center_input_sample": draw(st.booleans()),
        "flip_sin_to_cos": draw(st.booleans()),
        "mid_block_scale_factor": draw(st.sampled_from([1.0, 1.4])),
        "transformer_layers_per_block": draw(st.integers(1, 2)),
        "use_linear_projection": draw(st.booleans()),
        "upcast_attention": draw(st.booleans()),
        "attention_head_dim": draw(st.sampled_from([2, 4]) | st.just([2, 4, 2, 4][:levels])),
    }


def sizes() -> st.SearchStrategy[tuple[int, int]]:
    """From what four levels need; most are no multiples of what the levels divide by."""
    return st.tuples(st.integers(8, 19), st.integers(8, 19))


def tolerance(config: dict[str, Any]) -> float:
    """In float64, what is left are the products that an upcast makes in float32; norms of few values amplify them."""
    return 1e-3 if config["upcast_attention"] else 1e-9


def image_and_video(
    image: UNet2DConditionModel, sample: torch.Tensor, **attention
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the image model predicts for the first frames of `sample`, and the inflated one for all, in float64."""
    image, sample = image.double(), sample.double()
    video = UNet3DConditionModel.from_unet2d(image, **attention)
    timesteps = torch.tensor([11, 503, 998][: len(sample)])
    text = noise(len(sample), 7, CONTEXT_DIM, seed=1).double()
    with torch.no_grad():
        return image(sample[:, :, 0], timesteps, text).sample, video(sample, timesteps, text).sample


@pytest.mark.slow
@settings(max_examples=16)
@given(
    config=image_configs(), size=sizes(), batch=st.integers(1, 2), attention=st.sampled_from(["self", "first", "all"])
)
def test_one_frame_is_an_image(config, size, batch, attention):
    # With one frame every choice of frames is that frame; the temporal attention starts silent.
    sample = noise(batch, 4, 1, *size)
    of_image, of_video = image_and_video(image_unet(**config), sample, attention=(attention,))
    assert of_video.shape == sample.shape
    assert relative(of_video[:, :, 0], of_image) < tolerance(config)


@pytest.mark.slow
@settings(max_examples=10)
@given(config=image_configs(), size=sizes(), frames=st.integers(2, 4))
def test_a_still_video_is_an_image_in_every_frame(config, size, frames):
    # Only in a still video do the group norms, whose statistics are of all frames together, see an image's.
    sample = noise(1, 4, 1, *size).repeat(1, 1, frames, 1, 1)
    of_image, of_video = image_and_video(image_unet(**config), sample, attention=("first", "former"))
    for frame in range(frames):
        assert relative(of_video[:, :, frame], of_image) < tolerance(config)


def test_group_norms_are_of_all_frames_together():
    # Without any attention between the frames, the other frame still changes the statistics.
    image = image_unet()
    sample = noise(1, 4, 2, 8, 8)
    sample[:, :, 1] *= 3
    of_image, of_video = image_and_video(image, sample, attention=("self",), temporal=False)
    assert relative(of_video[:, :, 0], of_image) > 1e-2


def test_temporal_attention_off_is_as_silent_temporal_attention():
    image, sample = image_unet(), noise(1, 4, 3, 8, 8)
    _, silent = image_and_video(image, sample, temporal=True)
    _, off = image_and_video(image, sample, temporal=False)
    assert torch.equal(silent, off)


def test_temporal_attention_tells_frames_of_each_other():
    sample = noise(1, 4, 3, 8, 8)
    changed = sample.clone()
    changed[:, :, 2] = changed[:, :, 2].flip(-1)  # The same statistics.
    unet = video_unet(attention=("self",))
    text = noise(1, 7, CONTEXT_DIM)
    with torch.no_grad():
        before, after = (unet(video, 500, text).sample[:, :, 0] for video in (sample, changed))
    assert relative(after, before) > 1e-3


# Weights


@pytest.mark.slow
@settings(max_examples=10)
@given(config=image_configs())
def test_names_are_the_image_models_and_those_of_temporal_attention(config):
    image = image_unet(**config)
    video = UNet3DConditionModel.from_unet2d(image)
    new = video.state_dict().keys() - image.state_dict().keys()
    assert image.state_dict().keys() <= video.state_dict().keys()
    assert new and all(".attn_temp." in name or ".norm_temp." in name for name in new)


def test_only_the_temporal_output_starts_at_zero():
    zero = {
        name for name, value in UNet3DConditionModel.from_unet2d(image_unet()).named_parameters() if not value.any()
    }
    fresh = {name for name in zero if "attn_temp" in name}
    assert fresh and all(".to_out.0." in name for name in fresh)


def test_first_temporal_weights_are_of_the_seed():
    def queries(seed):
        torch.manual_seed(seed)
        state = UNet3DConditionModel.from_unet2d(image_unet()).state_dict()
        return torch.cat([value.flatten() for name, value in state.items() if "attn_temp.to_q" in name])

    assert torch.equal(queries(1), queries(1))
    assert not torch.equal(queries(1), queries(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_inflated_model_keeps_the_precision(dtype):
    unet = UNet3DConditionModel.from_unet2d(image_unet().to(dtype))
    assert {parameter.dtype for parameter in unet.parameters()} == {dtype}
    assert not unet.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_predicts_nearly_as_float32(dtype):
    sample, text = noise(1, 4, 3, 8, 8), noise(1, 7, CONTEXT_DIM)
    with torch.no_grad():
        full = video_unet()(sample, 500, text).sample
        half = video_unet().to(dtype)(sample.to(dtype), 500, text.to(dtype)).sample
    assert half.dtype == dtype
    assert relative(half.float(), full) < (3e-3 if dtype == torch.float16 else 3e-2)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_loading_from_a_folder(tmp_path, safe):
    image = image_unet()
    image.save_pretrained(tmp_path / "unet", safe_serialization=safe)
    assert (tmp_path / "unet" / "diffusion_pytorch_model.bin").exists() != safe
    loaded = UNet3DConditionModel.from_pretrained_2d(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in image.state_dict().items())


def test_loading_a_folder_without_subfolder(tmp_path):
    image_unet().save_pretrained(tmp_path)
    UNet3DConditionModel.from_pretrained_2d(tmp_path, subfolder=None)


def test_loading_in_half_precision(tmp_path):
    image_unet().save_pretrained(tmp_path / "unet")
    unet = UNet3DConditionModel.from_pretrained_2d(tmp_path, torch_dtype=torch.float16)
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.float16}


class Bomb:
    """Unpickled, it writes a file: what a hostile checkpoint could do."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return (open, (self.mark, "w"))


def damage(folder, how):
    """Spoil the image UNet in `folder / unet`; returns what the error must say."""
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    config = folder / "unet" / "config.json"
    state = image_unet().state_dict()
    if how == "no weights":
        weights.unlink()
    elif how == "no config":
        config.unlink()
    elif how == "no folder":
        shutil.rmtree(folder / "unet")
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "not JSON":
        config.write_text("{")
    elif how == "JSON, not a config":
        config.write_text("[1]")
    elif how == "pickled code":
        weights.unlink()
        torch.save(state | {"bomb": Bomb(folder / "exploded")}, weights.with_suffix(".bin"))
    elif how == "a text for weights":
        weights.unlink()
        weights.with_suffix(".bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    elif how == "a missing weight":
        del state["mid_block.resnets.0.conv1.weight"]
        torch.save(state, weights.with_suffix(".bin"))
        weights.unlink()
    elif how == "another shape":
        config.write_text(config.read_text().replace('"cross_attention_dim": 12', '"cross_attention_dim": 16'))
    elif how == "a block of another kind":
        config.write_text(config.read_text().replace("CrossAttnDownBlock2D", "AttnDownBlock2D"))
    else:
        raise AssertionError(how)


@pytest.mark.parametrize(
    "how",
    [
        "no weights",
        "no config",
        "no folder",
        "truncated",
        "not JSON",
        "JSON, not a config",
        "pickled code",
        "a text for weights",
        "a missing weight",
        "another shape",
        "a block of another kind",
    ],
)
def test_damaged_folder_is_refused_in_one_line(tmp_path, how):
    image_unet().save_pretrained(tmp_path / "unet")
    damage(tmp_path, how)
    with pytest.raises(TavError) as error:
        UNet3DConditionModel.from_pretrained_2d(tmp_path)
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "exploded").exists()


def test_folder_that_does_not_exist_is_refused_in_one_line(tmp_path):
    with pytest.raises(TavError, match="nowhere") as error:
        UNet3DConditionModel.from_pretrained_2d(tmp_path / "nowhere")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"class_embed_type": "timestep"},
        {"only_cross_attention": True},
        {"dual_cross_attention": True},
        {"addition_embed_type": "text"},
        {"time_cond_proj_dim": 8},
        {"conv_in_kernel": 5},
        {"mid_block_type": "UNetMidBlock2D"},
        {"encoder_hid_dim": 20, "encoder_hid_dim_type": "text_proj"},
        {"down_block_types": ("AttnDownBlock2D", "DownBlock2D")},
    ],
    ids=str,
)
def test_what_stable_diffusion_does_not_have_cannot_be_inflated(changes):
    with pytest.raises(TavError) as error:
        UNet3DConditionModel.from_unet2d(image_unet(**changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"only_cross_attention": [False, False]},
        {"dual_cross_attention": False},
        {"mid_block_only_cross_attention": False},
    ],
    ids=str,
)
def test_options_that_are_spelt_out_as_off_can_be_inflated(changes):
    UNet3DConditionModel.from_unet2d(image_unet(**changes))
