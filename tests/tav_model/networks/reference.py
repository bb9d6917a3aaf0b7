"""Attention over frames, read literally from its formula."""

import math

import torch
from hypothesis import strategies as st

from tav_model import SparseCausalAttention
from tav_model.networks.attention_plan import ATTENTION_FRAMES

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
