"""Scaled dot-product attention: precision, and the ways to compute it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tav_model.networks import cpu_kernels, dot_product_attention
from tav_model.networks.dot_product_attention import FEW_KEYS, attend, select_frames, splits_keys
from tests.support.models import noise
from tests.tav_model.networks.reference import spatial_attention


@pytest.mark.parametrize("under_autocast", [False, True])
@pytest.mark.parametrize("upcast", [False, True])
def test_upcast_computes_the_products_in_float32(monkeypatch, upcast, under_autocast):
    seen = set()
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(*tensors):
        out = attention(*tensors)
        seen.update(tensor.dtype for tensor in (*tensors, out))  # Autocast acts inside, and shows in what comes out.
        return out

    monkeypatch.setattr(dot_product_attention, "scaled_dot_product_attention", spy)
    layer = spatial_attention(("self",), upcast=upcast).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=under_autocast):
        out = layer(noise(3, FEW_KEYS + 1, 8).bfloat16(), 3)
    assert out.dtype == torch.bfloat16
    assert seen == {torch.float32 if upcast else torch.bfloat16}


@pytest.mark.parametrize("keys", [5, FEW_KEYS + 1])
def test_short_sequences_attend_as_long_ones_do(keys):
    query, key, value = noise(2, 3, 4, 8), noise(2, 3, keys, 8, seed=1), noise(2, 3, keys, 8, seed=2)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(attend(query, key, value), expected)


@pytest.mark.parametrize(
    ("dtype", "upcast", "splits"),
    [
        (torch.float32, False, True),
        (torch.float32, True, True),
        (torch.bfloat16, False, True),
        (torch.bfloat16, True, False),  # The kernels would compute in bfloat16.
    ],
)
def test_keys_are_split_where_the_kernels_compute_in_the_precision_that_is_asked_for(dtype, upcast, splits):
    assert splits_keys(noise(1, 2, 1, 3, 4).to(dtype), upcast) == splits


def test_keys_are_never_split_on_a_gpu():
    assert not splits_keys(torch.empty(1, 2, 1, 3, 4, device="meta"), upcast=False)


@pytest.mark.parametrize("attention", [("first", "former"), ("former", "next"), ("all",), ("self",)])
def test_without_the_cpu_kernels_keys_are_copied(monkeypatch, attention):
    layer, tokens = spatial_attention(attention), noise(2 * 4, 5, 8).double()

    def values_and_gradients():
        out = layer(tokens, 4)
        return [out, *torch.autograd.grad(out.square().sum(), list(layer.parameters()))]

    expected = values_and_gradients()
    monkeypatch.setattr(cpu_kernels, "_aten", object())  # as in a version of torch without these operators
    torch.testing.assert_close(values_and_gradients(), expected)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_chosen_frames_are_those_of_an_index(frames):
    tokens = noise(2, 6, 3)
    assert torch.equal(select_frames(tokens, frames), tokens[:, frames])


@pytest.mark.parametrize("frames", [[1, 2, 3], [4, 4, 4], [0]])
def test_consecutive_and_repeated_frames_are_views(frames):
    tokens = noise(2, 6, 3)
    assert select_frames(tokens, frames).untyped_storage().data_ptr() == tokens.untyped_storage().data_ptr()
