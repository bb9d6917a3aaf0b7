"""The video UNet: shapes, batches, arguments, saving and loading."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tav_model import UNet3DConditionModel
from tests.support.models import CONTEXT_DIM, noise, relative, video_unet


def sizes() -> st.SearchStrategy[tuple[int, int]]:
    """Most are no multiples of what the levels divide by."""
    return st.tuples(st.integers(8, 19), st.integers(8, 19))


@settings(max_examples=15)
@given(
    size=sizes(),
    frames=st.integers(1, 5),
    batch=st.integers(1, 2),
    attention=st.lists(
        st.sampled_from(["first", "former", "self", "middle", "next", "all"]), min_size=1, max_size=3, unique=True
    ),
    temporal=st.booleans(),
)
def test_prediction_is_finite_and_of_the_same_shape(size, frames, batch, attention, temporal):
    unet = video_unet(attention=tuple(attention), temporal=temporal)
    sample = noise(batch, 4, frames, *size)
    with torch.no_grad():
        prediction = unet(sample, 500, noise(batch, 7, CONTEXT_DIM)).sample
    assert prediction.shape == sample.shape
    assert prediction.isfinite().all()


@settings(max_examples=10)
@given(size=sizes(), frames=st.integers(1, 4))
def test_videos_of_a_batch_do_not_see_each_other(size, frames):
    unet = video_unet()
    sample, text, timesteps = noise(2, 4, frames, *size), noise(2, 7, CONTEXT_DIM), torch.tensor([100, 900])
    with torch.no_grad():
        together = unet(sample, timesteps, text).sample
        alone = [unet(sample[i : i + 1], timesteps[i], text[i : i + 1]).sample for i in range(2)]
    assert relative(together, torch.cat(alone)) < 1e-5


def test_return_dict_false_gives_a_tuple():
    unet, sample, text = video_unet(), noise(1, 4, 2, 8, 8), noise(1, 7, CONTEXT_DIM)
    with torch.no_grad():
        (prediction,) = unet(sample, 3, text, return_dict=False)
        assert torch.equal(prediction, unet(sample, 3, text).sample)


@pytest.mark.parametrize(
    ("sample", "timestep", "text", "named"),
    [
        ((1, 4, 8, 8), 1, (1, 7, CONTEXT_DIM), "sample"),
        ((1, 3, 2, 8, 8), 1, (1, 7, CONTEXT_DIM), "sample"),
        ((2, 4, 2, 8, 8), 1, (1, 7, CONTEXT_DIM), "encoder_hidden_states"),
        ((2, 4, 2, 8, 8), torch.tensor([1, 2, 3]), (2, 7, CONTEXT_DIM), "timestep"),
        ((2, 4, 2, 8, 8), torch.tensor([[1, 2]]), (2, 7, CONTEXT_DIM), "timestep"),
    ],
)
def test_shapes_that_do_not_fit_are_named(sample, timestep, text, named):
    with pytest.raises(ValueError, match=f"^{named}: ") as error:
        video_unet()(torch.zeros(sample), timestep, torch.zeros(text))
    assert "\n" not in str(error.value)


def zeros_like_skip_connections(unet, sample):
    """The skip connections of `video_unet`: the first convolution, a layer, a downsampling, a layer."""
    b, _, f, h, w = sample.shape
    half = (-(-h // 2), -(-w // 2))
    sizes = [(8, h, w), (8, h, w), (8, *half), (16, *half)]
    return [torch.zeros(b, c, f, *size) for c, *size in sizes], torch.zeros(b, 16, f, *half)


@torch.no_grad()
def test_additional_residuals_of_zero_change_nothing_and_others_do():
    unet, sample, text = video_unet(), noise(1, 4, 3, 8, 9), noise(1, 7, CONTEXT_DIM)
    plain = unet(sample, 3, text).sample
    down, mid = zeros_like_skip_connections(unet, sample)
    levels = [down[1], down[3]]
    names = {
        "down_block_additional_residuals": down,
        "mid_block_additional_residual": mid,
        "down_intrablock_additional_residuals": levels,
    }
    assert torch.equal(unet(sample, 3, text, **names).sample, plain)
    for name, value in names.items():
        ones = [one + 1 for one in value] if isinstance(value, list) else value + 1
        assert relative(unet(sample, 3, text, **names | {name: ones}).sample, plain) > 1e-3
    # The map of the first level enters its last layer: the second level and the skip connection see it.
    first = [torch.ones_like(levels[0])]
    assert relative(unet(sample, 3, text, down_intrablock_additional_residuals=first).sample, plain) > 1e-3


def test_additional_residuals_of_another_model_are_named():
    unet, sample, text = video_unet(), noise(1, 4, 3, 8, 8), noise(1, 7, CONTEXT_DIM)
    down, _ = zeros_like_skip_connections(unet, sample)
    with pytest.raises(ValueError, match="down_block_additional_residuals: 3 for 4 skip connections"):
        unet(sample, 3, text, down_block_additional_residuals=down[:3])
    with pytest.raises(ValueError, match="down_intrablock_additional_residuals: 4 for 2 levels"):
        unet(sample, 3, text, down_intrablock_additional_residuals=down)


def test_inflated_model_saves_and_loads_whole(tmp_path):
    unet = video_unet(attention=("first", "self"), temporal=False)
    unet.save_pretrained(tmp_path)
    loaded = UNet3DConditionModel.from_pretrained(tmp_path)
    assert (tuple(loaded.config.attention), loaded.config.temporal) == (("first", "self"), False)
    for name, value in unet.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


@pytest.mark.parametrize(
    "changes",
    [
        {"block_out_channels": (8, 16, 16)},
        {"layers_per_block": [1]},
        {"attention_head_dim": [2, 2, 2]},
        {"attention": ("first", "formr")},
        {"attention": ()},
        {"attention": "first"},
    ],
    ids=str,
)
def test_arguments_that_contradict_each_other_are_refused(changes):
    config = {"block_out_channels": (8, 16), "norm_num_groups": 4, "cross_attention_dim": CONTEXT_DIM}
    config |= {"down_block_types": ["DownBlock3D"] * 2, "up_block_types": ["UpBlock3D"] * 2}
    with pytest.raises(ValueError, match=r"\A.*\Z"):
        UNet3DConditionModel(**config | changes)
