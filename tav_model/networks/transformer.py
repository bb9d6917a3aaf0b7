"""Transformer blocks over a video: spatio-temporal, cross- and temporal attention, and a feed-forward network.

Tokens are `(b f) n c`: `n = h * w` positions of `f` frames of `b` videos. State-dict names are those of the Stable
Diffusion UNet, plus `attn_temp` and `norm_temp`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from einops import rearrange
from torch import nn

from tav_model.networks.attention import Attention, SparseCausalAttention
from tav_model.networks.attention_plan import TUNE_A_VIDEO
from tav_model.networks.memory_efficient import Conv2d, FeedForward, GroupNorm, LayerNorm, is_frozen, recomputed


class BasicTransformerBlock(nn.Module):
    """Spatio-temporal attention, cross-attention, feed-forward, temporal attention, each with norm and residual.

    The image model has no temporal attention. Its output projection starts at zero, weight and bias, so that an
    inflated model at first computes what the image model does. `temporal=False` leaves it out of the computation.
    """

    gradient_checkpointing = False  # diffusers sets it

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        cross_attention_dim: int,
        dropout: float = 0.0,
        upcast_attention: bool = False,
        attention: Sequence[str] = TUNE_A_VIDEO,
        temporal: bool = True,
    ) -> None:
        super().__init__()
        shape: dict[str, Any] = {"heads": num_attention_heads, "dim_head": attention_head_dim}
        shape |= {"dropout": dropout, "upcast": upcast_attention}
        self.temporal = temporal
        self.norm1 = LayerNorm(dim)
        self.attn1 = SparseCausalAttention(dim, attention, **shape)
        self.norm2 = LayerNorm(dim)
        self.attn2 = Attention(dim, cross_attention_dim, **shape)
        self.norm3 = LayerNorm(dim)
        self.ff = FeedForward(dim, dropout)
        self.norm_temp = LayerNorm(dim)
        self.attn_temp = Attention(dim, **shape)
        self.attn_temp.zero_output()

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, num_frames: int
    ) -> torch.Tensor:
        """Return `(b f) n c` for tokens `(b f) n c` and the text of each video, `b m c'`."""
        normed = self.norm1(hidden_states)
        with self._recomputed(normed, self.norm1, hidden_states):
            hidden_states = hidden_states + self.attn1(normed, num_frames)
        normed = self.norm2(hidden_states)
        with self._recomputed(normed, self.norm2, hidden_states):
            hidden_states = hidden_states + self.attn2(normed, encoder_hidden_states)
        hidden_states = hidden_states + self.ff(hidden_states, self.norm3)
        if self.temporal:
            positions = rearrange(hidden_states, "(b f) n c -> (b n) f c", f=num_frames)
            normed = self.norm_temp(positions)
            with self._recomputed(normed, self.norm_temp, positions):
                positions = positions + self.attn_temp(normed)
            n = hidden_states.shape[1]
            hidden_states = rearrange(positions, "(b n) f c -> (b f) n c", n=n)
        return hidden_states

    def _recomputed(
        self, normed: torch.Tensor, norm: LayerNorm, hidden_states: torch.Tensor
    ) -> AbstractContextManager[Any]:
        """Keep no normed tokens for the weights of the products after the norm: the norm is computed again.

        A checkpointed block keeps nothing that could be left out.
        """
        if self.gradient_checkpointing or not is_frozen(norm):
            return nullcontext()
        return recomputed(normed, norm, hidden_states)


class Transformer3DModel(nn.Module):
    """Group norm of each frame, projection in, transformer blocks, projection out, and a residual connection."""

    def __init__(
        self,
        num_attention_heads: int,
        attention_head_dim: int,
        in_channels: int,
        cross_attention_dim: int,
        num_layers: int = 1,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        use_linear_projection: bool = False,
        upcast_attention: bool = False,
        attention: Sequence[str] = TUNE_A_VIDEO,
        temporal: bool = True,
    ) -> None:
        super().__init__()
        inner_dim = num_attention_heads * attention_head_dim
        self.use_linear_projection = use_linear_projection
        self.norm = GroupNorm(norm_num_groups, in_channels, eps=1e-6)
        self.proj_in = nn.Linear(in_channels, inner_dim) if use_linear_projection else Conv2d(in_channels, inner_dim, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                inner_dim,
                num_attention_heads,
                attention_head_dim,
                cross_attention_dim,
                dropout=dropout,
                upcast_attention=upcast_attention,
                attention=attention,
                temporal=temporal,
            )
            for _ in range(num_layers)
        )
        self.proj_out = (
            nn.Linear(inner_dim, in_channels) if use_linear_projection else Conv2d(inner_dim, in_channels, 1)
        )

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        """Return `b c f h w` for a video `b c f h w` and its text `b m c'`."""
        b, _, f, h, _ = hidden_states.shape
        frames = rearrange(hidden_states, "b c f h w -> (b f) c h w")
        tokens = self.norm(frames)
        if self.use_linear_projection:
            tokens = self.proj_in(rearrange(tokens, "bf c h w -> bf (h w) c"))
        else:
            tokens = rearrange(self.proj_in(tokens), "bf c h w -> bf (h w) c")
        for block in self.transformer_blocks:
            tokens = block(tokens, encoder_hidden_states, num_frames=f)
        if self.use_linear_projection:
            residual = rearrange(self.proj_out(tokens), "bf (h w) c -> bf c h w", h=h)
        else:
            residual = self.proj_out(rearrange(tokens, "bf (h w) c -> bf c h w", h=h))
        return rearrange(frames + residual, "(b f) c h w -> b c f h w", b=b)
