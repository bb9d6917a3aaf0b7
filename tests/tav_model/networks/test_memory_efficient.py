"""The layers that keep less: values and gradients of torch's own, and what they keep."""

import pytest
import torch
from diffusers.models.attention import FeedForward as TheirFeedForward
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from tav_model.networks import memory_efficient
from tav_model.networks.memory_efficient import GEGLU, Conv2d, FeedForward, GroupNorm, LayerNorm, recompute
from tav_model.networks.transformer import BasicTransformerBlock
from tests.support.models import noise


class Activated(nn.Module):
    """A group norm with its activation, as the residual blocks call it."""

    def __init__(self, norm, activation):
        super().__init__()
        self.norm, self.activation = norm, activation

    def forward(self, images):
        return self.norm(images, self.activation)


def bytes_kept(module, *inputs):
    """Bytes of the tensors that the backward pass keeps, other than inputs and weights."""
    tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
    known = {tensor.untyped_storage().data_ptr() for tensor in (*tensors, *module.parameters())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # Held, so that no address is used twice.
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(*inputs)
    return sum(size for size, _ in kept.values())


def gradients(module, tensor, weights, trained):
    module.requires_grad_(trained)
    tensor = tensor.clone().requires_grad_()
    out = module(tensor)
    wanted = [tensor, *(module.parameters() if trained else ())]
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), wanted)]


@pytest.mark.parametrize("trained", [False, True])
@settings(max_examples=25, deadline=None)
@given(
    kernel=st.sampled_from([1, 3]),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    bias=st.booleans(),
    size=st.tuples(st.integers(3, 7), st.integers(3, 7)),
)
def test_convolution(trained, kernel, stride, padding, bias, size):
    torch.manual_seed(0)
    ours = Conv2d(3, 4, kernel, stride=stride, padding=padding, bias=bias).double()
    theirs = nn.Conv2d(3, 4, kernel, stride=stride, padding=padding, bias=bias).double()
    theirs.load_state_dict(ours.state_dict())
    images = noise(2, 3, *size).double()
    weights = torch.randn_like(theirs(images))
    for our, their in zip(
        gradients(ours, images, weights, trained), gradients(theirs, images, weights, trained), strict=True
    ):
        torch.testing.assert_close(our, their)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("activation", [None, functional.silu])
def test_group_norm(activation, trained):
    ours, theirs = GroupNorm(2, 6).double(), nn.GroupNorm(2, 6).double()
    for norm in (ours, theirs):
        norm.weight.data, norm.bias.data = noise(6).double(), noise(6, seed=1).double()
    video, weights = noise(2, 6, 3, 4, 5, seed=2).double(), noise(2, 6, 3, 4, 5, seed=3).double()
    theirs = nn.Sequential(theirs, nn.SiLU() if activation else nn.Identity())
    for our, their in zip(
        gradients(Activated(ours, activation), video, weights, trained),
        gradients(theirs, video, weights, trained),
        strict=True,
    ):
        torch.testing.assert_close(our, their)


@pytest.mark.parametrize("trained", [False, True])
def test_feed_forward(trained):
    torch.manual_seed(0)
    ours, theirs = FeedForward(6).double(), TheirFeedForward(6, activation_fn="geglu").double()
    ours.load_state_dict(theirs.state_dict())  # The names are the image model's.
    tokens, weights = noise(2, 5, 6).double(), noise(2, 5, 6, seed=1).double()
    for our, their in zip(
        gradients(ours, tokens, weights, trained), gradients(theirs, tokens, weights, trained), strict=True
    ):
        torch.testing.assert_close(our, their)


def test_frozen_layers_keep_only_what_the_backward_pass_cannot_do_without():
    images = noise(2, 6, 8, 8)
    size = images.nbytes
    image = images.requires_grad_()
    norm = GroupNorm(2, 6).requires_grad_(False)
    assert bytes_kept(Conv2d(6, 6, 3, padding=1).requires_grad_(False), image) == 0
    assert bytes_kept(Activated(norm, functional.silu), image) == 0
    tokens = noise(1, 64, 6).requires_grad_()
    assert bytes_kept(GEGLU(6, 24).requires_grad_(False), tokens) == 2 * 4 * tokens.nbytes  # Both factors.
    assert (
        bytes_kept(nn.Sequential(nn.GroupNorm(2, 6), nn.SiLU()).requires_grad_(False), image) > size
    )  # As torch does.


@pytest.mark.parametrize("layer", [GroupNorm(2, 4), LayerNorm(4)], ids=["group", "layer"])
def test_norms_stay_in_the_precision_of_their_input_with_statistics_in_float32(layer):
    # A mean far from zero: statistics in bfloat16 would be all wrong.
    values = (noise(3, 4, 4) + 50).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(values)
    assert out.dtype == torch.bfloat16
    assert (out.float() - layer(values.float())).abs().max() < 0.02


def test_recomputing_gives_the_gradients_of_each_input():
    a, b = (noise(4, 3, seed=seed).double().requires_grad_() for seed in (0, 1))
    torch.autograd.gradcheck(lambda a, b: recompute(lambda x, y: x.sin() * y, a, b), (a, b))


# Large tensors on a CPU


@pytest.fixture
def all_large(monkeypatch):
    """Return a function that makes every tensor large from then on."""
    return lambda: monkeypatch.setattr(memory_efficient, "LARGE_BYTES", 0)


def block_results(autocast, trained):
    """The output of a transformer block and the gradients of its input and trained weights, and the bytes that it keeps."""
    torch.manual_seed(0)
    block = BasicTransformerBlock(8, 2, 4, 6)
    dtype = torch.bfloat16 if autocast else torch.float32
    for name, parameter in block.named_parameters():
        parameter.data = torch.randn_like(parameter)  # The temporal attention has an effect.
        parameter.requires_grad_(any(module in name for module in trained))
        if not parameter.requires_grad and "norm" not in name:
            parameter.data = parameter.data.to(dtype)  # as the tuner casts them
    tokens, text = noise(6, 16, 8).to(dtype).requires_grad_(), noise(2, 3, 6).to(dtype)
    weights = [parameter for parameter in block.parameters() if parameter.requires_grad]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kept = bytes_kept(block, tokens, text, 3)
        out = block(tokens, text, 3)
    return kept, [out.detach(), *torch.autograd.grad(out.float().square().sum(), [tokens, *weights])]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "trained", [("attn1.to_q", "attn2.to_q", "attn_temp"), ("norm", "ff")], ids=["attention", "norms and feed-forward"]
)
def test_large_tensors_are_computed_again_with_bit_identical_gradients(all_large, autocast, trained):
    kept, expected = block_results(autocast, trained)
    all_large()
    less_kept, results = block_results(autocast, trained)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results, expected, strict=True))
    assert less_kept < 0.6 * kept or "ff" in trained


def test_a_large_feed_forward_keeps_nothing_but_its_input(all_large):
    all_large()
    tokens = noise(1, 64, 6).requires_grad_()
    norm, layer = (module.requires_grad_(False) for module in (LayerNorm(6), GEGLU(6, 24)))
    assert bytes_kept(Activated(layer, norm), tokens) == 0
