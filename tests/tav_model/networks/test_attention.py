"""Attention over frames against a literal reading of its formula."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tav_model.networks import cpu_kernels, dot_product_attention
from tav_model.networks.attention import Attention
from tests.support.models import noise, relative
from tests.tav_model.networks.reference import name_lists, slow_attention, spatial_attention


@pytest.fixture(params=["split", "copied"])
def keys_are(request, monkeypatch):
    """Both ways to attend to several frames: the one of CPUs and the one of GPUs."""
    monkeypatch.setattr(dot_product_attention, "splits_keys", lambda query, upcast: request.param == "split")
    return request.param


either_way = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@settings(either_way, max_examples=80)
@given(attention=name_lists, num_frames=st.integers(1, 6), videos=st.integers(1, 3), positions=st.integers(1, 4))
def test_sparse_causal_attention_is_the_formula(keys_are, attention, num_frames, videos, positions):
    layer = spatial_attention(attention)
    tokens = 3 * noise(videos * num_frames, positions, 8).double()
    with torch.no_grad():
        assert relative(layer(tokens, num_frames), slow_attention(layer, tokens, num_frames)) < 1e-9


@pytest.mark.parametrize("num_frames", range(1, 7))
def test_tune_a_videos_choice_is_the_first_and_the_former_frame(num_frames):
    # METHOD's formula once more, without the names: K = [k_1 ; k_{i-1}].
    layer = spatial_attention(("first", "former"))
    tokens = 3 * noise(num_frames, 5, 8).double()
    with torch.no_grad():
        query, key, value = (
            project(tokens).unflatten(-1, (2, 4)).transpose(1, 2) for project in (layer.to_q, layer.to_k, layer.to_v)
        )
        expected = []
        for i in range(num_frames):
            k, v = (torch.cat([x[0], x[max(i - 1, 0)]], dim=1) for x in (key, value))
            expected.append(((query[i] @ k.mT / 2).softmax(-1) @ v).transpose(0, 1).flatten(1))
        expected = layer.to_out[0](torch.stack(expected))
        assert relative(layer(tokens, num_frames), expected) < 1e-9


@settings(either_way, max_examples=30)
@given(attention=name_lists, num_frames=st.integers(1, 5), videos=st.integers(1, 2))
def test_gradients_are_those_of_the_formula(keys_are, attention, num_frames, videos):
    layer = spatial_attention(attention)
    tokens = noise(videos * num_frames, 3, 8).double().requires_grad_()
    weights = noise(videos * num_frames, 3, 8, seed=1).double()
    inputs = [tokens, *layer.parameters()]
    ours = torch.autograd.grad((layer(tokens, num_frames) * weights).sum(), inputs)
    theirs = torch.autograd.grad((slow_attention(layer, tokens, num_frames) * weights).sum(), inputs)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-7, atol=1e-9)


@pytest.fixture
def calls(monkeypatch):
    """How many queries each call of attention has, and how many keys they see: `[(queries, keys)]`."""
    seen = []

    def spy(attend):
        def attend_and_note(query, key, *rest):
            seen.append((query.shape[0] * query.shape[2], key.shape[2]))
            return attend(query, key, *rest)

        return attend_and_note

    monkeypatch.setattr(dot_product_attention, "attend", spy(dot_product_attention.attend))
    monkeypatch.setattr(cpu_kernels, "flash_attention", spy(cpu_kernels.flash_attention))
    return seen


def test_cost_is_linear_in_the_frames(keys_are, calls):
    n = 3
    costs = []
    for f in (8, 16):
        calls.clear()
        layer = spatial_attention(("first", "former"))
        layer(noise(f, n, 8).double(), f)
        costs.append(sum(queries * keys for queries, keys in calls))
        assert costs[-1] == (2 * f - 2) * n**2  # Two frames' keys each, but one for the first two.
    assert costs[1] < 2.2 * costs[0]


def test_each_frames_keys_are_projected_once():
    layer = spatial_attention(("first", "first", "former"))
    projected = []
    layer.to_k.register_forward_hook(lambda _, inputs, __: projected.append(inputs[0].shape[1]))
    layer(noise(2 * 5, 3, 8).double(), 5)
    assert projected == [4 * 3]  # Nobody looks back at the last of the five.


def test_keys_that_all_frames_share_are_not_copied(keys_are, calls):
    layer = spatial_attention(("first",))
    layer(noise(4, 3, 8).double(), 4)
    assert calls == [(4 * 3, 3)]


def test_attention_to_a_context_of_another_width():
    torch.manual_seed(0)
    layer = Attention(8, cross_attention_dim=6, heads=2, dim_head=4).double()
    tokens, context = noise(2, 5, 8).double(), noise(2, 7, 6, seed=1).double()
    with torch.no_grad():
        q, k, v = (
            x.unflatten(-1, (2, 4)).transpose(1, 2)
            for x in (layer.to_q(tokens), layer.to_k(context), layer.to_v(context))
        )
        expected = layer.to_out[0](((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2))
        assert relative(layer(tokens, context), expected) < 1e-9


def test_frames_that_attend_to_one_text_give_what_each_alone_gives():
    torch.manual_seed(0)
    layer = Attention(8, cross_attention_dim=6, heads=2, dim_head=4).double()
    tokens, text = noise(2 * 3, 5, 8).double(), noise(2, 7, 6, seed=1).double()
    with torch.no_grad():
        assert relative(layer(tokens, text), layer(tokens, text.repeat_interleave(3, dim=0))) < 1e-12
