"""Transformer blocks: the temporal attention that inflation adds."""

import torch

from tav_model import BasicTransformerBlock
from tests.support.models import noise, relative, seeded


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
