"""Attention over frames against a literal reading of its formula."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tav_model import BasicTransformerBlock, SparseCausalAttention
from tav_model.networks.attention import ATTENTION_FRAMES, SHORT, Attention, check_attention_frames, key_frames
from tav_model.networks.split_key_attention import Part, split_by_name
from tests.support.models import noise, relative, seeded


@pytest.fixture(params=["merged", "copied"])
def keys_are(request, monkeypatch):
    """Both ways to attend to several frames: the one of CPUs and the one of GPUs."""
    monkeypatch.setattr("tav_model.networks.attention.merges", lambda query: request.param == "merged")
    return request.param


either_way = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
name_lists = st.lists(st.sampled_from(ATTENTION_FRAMES), min_size=1, max_size=4)


def named_frames(name: str, frame: int, num_frames: int) -> list[int]:
    """The frames, counted from 0, that one name stands for."""
    if name == "first":
        return [0]
    if name == "former":
        return [frame - 1] if frame > 0 else [0]
    if name == "self":
        return [frame]
    if name == "middle":
        return [num_frames // 2]
    if name == "next":
        return [frame + 1] if frame < num_frames - 1 else [frame]
    assert name == "all"
    return list(range(num_frames))


def slow_attention(layer: SparseCausalAttention, tokens: torch.Tensor, num_frames: int) -> torch.Tensor:
    """`softmax(Q K^T / sqrt(d)) V` for each video, frame and head, keys and values concatenated frame after frame."""
    query, key, value = layer.to_q(tokens), layer.to_k(tokens), layer.to_v(tokens)
    width = query.shape[-1] // layer.heads
    out = torch.empty_like(query)
    for start in range(0, len(tokens), num_frames):
        for frame in range(num_frames):
            sources = [start + s for name in layer.attention for s in named_frames(name, frame, num_frames)]
            for head in range(layer.heads):
                part = slice(head * width, (head + 1) * width)
                q = query[start + frame, :, part]
                k = torch.cat([key[source, :, part] for source in sources])
                v = torch.cat([value[source, :, part] for source in sources])
                out[start + frame, :, part] = (q @ k.T / math.sqrt(width)).softmax(-1) @ v
    return layer.to_out[0](out)


def spatial_attention(attention, dim=8, **changes) -> SparseCausalAttention:
    torch.manual_seed(0)
    return SparseCausalAttention(dim, attention, **{"heads": 2, "dim_head": 4} | changes).double().eval()


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


@given(attention=name_lists, num_frames=st.integers(1, 12))
def test_key_frames_weigh_every_named_frame_as_often_as_it_is_named(attention, num_frames):
    for frame, sources in enumerate(key_frames(attention, num_frames)):
        named = [index for name in attention for index in named_frames(name, frame, num_frames)]
        assert set(sources) == set(named)
        # Shares of the softmax are kept: the counts are in the same proportion, and in the smallest whole numbers.
        shrunk = {len(named) / len(sources)} | {named.count(i) / sources.count(i) for i in set(named)}
        assert len(shrunk) == 1
        assert math.gcd(*(sources.count(i) for i in set(sources))) == 1


@given(attention=name_lists, num_frames=st.integers(1, 12))
def test_key_frames_come_in_the_order_they_are_named(attention, num_frames):
    for frame, sources in enumerate(key_frames(attention, num_frames)):
        named = [index for name in attention for index in named_frames(name, frame, num_frames)]
        assert list(dict.fromkeys(sources)) == list(dict.fromkeys(named))


def test_key_frames_of_tune_a_video():
    assert key_frames(("first", "former"), 5) == [(0,), (0,), (0, 1), (0, 2), (0, 3)]


def test_key_frames_of_the_middle_and_the_next():
    assert key_frames(("middle", "next"), 4) == [(2, 1), (2,), (2, 3), (2, 3)]


def spy_on_attention(layer, monkeypatch):
    """How many queries each call has, and how many keys they see: `[(queries, keys)]`."""
    seen = []

    def spy(attend):
        def attend_and_note(query, key, value):
            seen.append((query.shape[0] * query.shape[2], key.shape[2]))
            return attend(query, key, value)

        return attend_and_note

    monkeypatch.setattr(layer, "attend", spy(layer.attend))
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    ours = SimpleNamespace(_scaled_dot_product_flash_attention_for_cpu=spy(fused))
    monkeypatch.setattr("tav_model.networks.split_key_attention.aten", ours)
    return seen


def test_cost_is_linear_in_the_frames(keys_are, monkeypatch):
    n = 3
    costs = []
    for f in (8, 16):
        layer = spatial_attention(("first", "former"))
        seen = spy_on_attention(layer, monkeypatch)
        layer(noise(f, n, 8).double(), f)
        costs.append(sum(queries * keys for queries, keys in seen))
        assert costs[-1] == (2 * f - 2) * n**2  # Two frames' keys each, but one for the first two.
    assert costs[1] < 2.2 * costs[0]


def test_each_frames_keys_are_projected_once():
    layer = spatial_attention(("first", "first", "former"))
    projected = []
    layer.to_k.register_forward_hook(lambda _, inputs, __: projected.append(inputs[0].shape[1]))
    layer(noise(2 * 5, 3, 8).double(), 5)
    assert projected == [4 * 3]  # Nobody looks back at the last of the five.


def test_keys_that_all_frames_share_are_not_copied(keys_are, monkeypatch):
    layer = spatial_attention(("first",))
    seen = spy_on_attention(layer, monkeypatch)
    layer(noise(4, 3, 8).double(), 4)
    assert seen == [(4 * 3, 3)]


@pytest.mark.parametrize("under_autocast", [False, True])
@pytest.mark.parametrize("upcast", [False, True])
def test_upcast_computes_the_products_in_float32(monkeypatch, upcast, under_autocast):
    seen = set()
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(*tensors):
        out = attend(*tensors)
        seen.update(tensor.dtype for tensor in (*tensors, out))  # Autocast acts inside, and shows in what comes out.
        return out

    monkeypatch.setattr("tav_model.networks.attention.F.scaled_dot_product_attention", spy)
    layer = spatial_attention(("self",), upcast=upcast).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=under_autocast):
        out = layer(noise(3, SHORT + 1, 8).bfloat16(), 3)
    assert out.dtype == torch.bfloat16
    assert seen == {torch.float32 if upcast else torch.bfloat16}


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


@pytest.mark.parametrize("keys", [5, SHORT + 1])
def test_short_sequences_attend_as_long_ones_do(keys):
    query, key, value = noise(2, 3, 4, 8), noise(2, 3, keys, 8, seed=1), noise(2, 3, keys, 8, seed=2)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(Attention(8).attend(query, key, value), expected)


@settings(max_examples=60)
@given(attention=name_lists, num_frames=st.integers(1, 9))
def test_the_parts_of_attention_are_the_frames_that_are_named(attention, num_frames):
    sources = key_frames(attention, num_frames)
    seen = sorted({frame for source in sources for frame in source})
    found = {frame: [] for frame in range(num_frames)}
    groups = split_by_name(attention, sources, seen)
    for part in (part for group in groups for part in group):
        for place, frame in enumerate(range(part.start, part.stop)):
            keys = range(part.keys_start, part.keys_stop)
            found[frame] += [seen[key] for key in (keys if part.shared else [keys[place]])]
    for frame, frames in found.items():
        named = [index for name in attention for index in named_frames(name, frame, num_frames)]
        assert frames == (named if len(set(named)) > 1 else named[:1])
    assert sorted(i for part in groups[0] for i in range(part.start, part.stop)) == list(range(num_frames))


def test_tune_a_videos_attention_has_two_parts():
    sources = key_frames(("first", "former"), 8)
    assert split_by_name(("first", "former"), sources, range(7)) == [
        [Part(0, 8, 0, 1, shared=True)],
        [Part(2, 8, 1, 7, shared=False)],
    ]


def test_a_new_blocks_temporal_attention_is_silent():
    block = BasicTransformerBlock(8, 2, 4, 6)
    tokens = noise(3, 5, 8)
    assert not block.attn_temp(tokens).any()
    assert block.attn1(tokens, 3).any()


def test_temporal_attention_is_over_the_frames_of_one_position():
    torch.manual_seed(0)
    block = BasicTransformerBlock(8, 2, 4, 6, attention=("self",)).double().eval()
    for parameter in block.attn_temp.parameters():
        parameter.data = torch.randn(parameter.shape, generator=seeded(1)).double()
    frames, positions = 4, 3
    text = noise(1, 5, 6).double()
    tokens = noise(frames, positions, 8).double()
    with torch.no_grad():
        out = block(tokens, text, frames)
        block.temporal = False
        spatial = block(tokens, text, frames)
        for position in range(positions):
            line = spatial[:, position][None]
            expected = line + block.attn_temp(block.norm_temp(line))
            assert relative(out[:, position], expected[0]) < 1e-9


@pytest.mark.parametrize("names", [(), ("former", "fist"), "first", ("",)])
def test_unknown_names_of_frames_are_refused_with_what_is_allowed(names):
    with pytest.raises(ValueError, match=r"\Aattention: .*first, former, self, middle, next, all\Z"):
        check_attention_frames(names)
