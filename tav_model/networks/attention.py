"""Attention over a video: sparse-causal across frames, cross to the text, temporal along each position.

Tune-A-Video (arXiv 2212.11565), section 3.2. Everything here works on tokens, `(b f) n c`: `n = h * w` positions of
`f` frames of `b` videos. State-dict names are those of the Stable Diffusion UNet, plus `attn_temp` and `norm_temp`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import reduce
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from tav_model.networks.memory_efficient import Conv2d, FeedForward, GroupNorm, LayerNorm
from tav_model.networks.split_key_attention import merged_attention, split_by_name

ATTENTION_FRAMES = ("first", "former", "self", "middle", "next", "all")
TUNE_A_VIDEO = ("first", "former")
# Keys up to which, on a CPU, plain products are faster than torch's fused attention.
SHORT = 32


def check_attention_frames(attention: Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple; `ValueError` if there is none or one that is not in `ATTENTION_FRAMES`."""
    unknown = [name for name in attention if name not in ATTENTION_FRAMES]
    if isinstance(attention, str) or unknown or not attention:
        raise ValueError(f"attention: {attention!r} must be a list of one or more of {', '.join(ATTENTION_FRAMES)}")
    return tuple(attention)


def key_frames(attention: Sequence[str], num_frames: int) -> list[tuple[int, ...]]:
    """For each frame, the frames that its keys and values come from, in the order of concatenation.

    When every frame in such a list occurs equally often, once is enough: `softmax` over `[k; k]` weighs the values as
    over `k`. That is the case of the first two frames of Tune-A-Video, whose former frame is the first one.
    """
    last = num_frames - 1
    sources = []
    for frame in range(num_frames):
        named = {
            "first": [0],
            "former": [max(frame - 1, 0)],
            "self": [frame],
            "middle": [num_frames // 2],
            "next": [min(frame + 1, last)],
            "all": list(range(num_frames)),
        }
        source = [index for name in attention for index in named[name]]
        distinct = list(dict.fromkeys(source))
        repeats = [source.count(index) for index in distinct]
        common = reduce(gcd, repeats)
        sources.append(tuple(i for i, count in zip(distinct, repeats, strict=True) for _ in range(count // common)))
    return sources


def merges(query: torch.Tensor) -> bool:
    """Whether attention to several frames is put together from its parts instead of copying keys and values.

    On a GPU, copying takes a thousandth of the time, and fused attention over whole sequences is the faster one.
    """
    return query.device.type == "cpu"


def _select(frames: torch.Tensor, chosen: Sequence[int]) -> torch.Tensor:
    """`b f n c` -> the chosen of the f frames, a view where they are neighbours."""
    first, last = chosen[0], chosen[-1]
    if last - first + 1 == len(chosen):
        return frames[:, first : last + 1]
    return frames[:, chosen]


class Attention(nn.Module):
    """Multi-head attention, `softmax(Q K^T / sqrt(d)) V`, from `hidden_states` to `encoder_hidden_states` (or itself).

    `upcast` computes the products in float32, which Stable Diffusion 2.1 needs in half precision.
    """

    def __init__(
        self,
        query_dim: int,
        cross_attention_dim: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        bias: bool = False,
        upcast: bool = False,
    ) -> None:
        super().__init__()
        inner_dim = heads * dim_head
        context_dim = query_dim if cross_attention_dim is None else cross_attention_dim
        self.heads = heads
        self.upcast = upcast
        self.to_q = nn.Linear(query_dim, inner_dim, bias=bias)
        self.to_k = nn.Linear(context_dim, inner_dim, bias=bias)
        self.to_v = nn.Linear(context_dim, inner_dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(inner_dim, query_dim), nn.Dropout(dropout)])

    def split_heads(self, tokens: torch.Tensor) -> torch.Tensor:
        return rearrange(tokens, "b n (heads d) -> b heads n d", heads=self.heads)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """`b heads n d`, keys and values `b heads m d` -> `b heads n d`."""
        if not self.upcast:
            if query.device.type == "cpu" and key.shape[-2] <= SHORT:
                # Over a few frames, what the fused attention of CPUs spends on each sequence is more than the products.
                scores = (query * query.shape[-1] ** -0.5) @ key.mT
                return scores.softmax(dim=-1) @ value
            return F.scaled_dot_product_attention(query, key, value)
        with torch.autocast(query.device.type, enabled=False):
            return F.scaled_dot_product_attention(query.float(), key.float(), value.float()).to(value.dtype)

    def project_out(self, heads: torch.Tensor) -> torch.Tensor:
        projection, dropout = self.to_out
        return dropout(projection(rearrange(heads, "b heads n d -> b n (heads d)")))

    def start_at_zero(self) -> None:
        """Let the output be zero until it is trained."""
        projection, _ = self.to_out
        assert isinstance(projection, nn.Linear)
        nn.init.zeros_(projection.weight)
        nn.init.zeros_(projection.bias)

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None) -> torch.Tensor:
        """`b n c`, optionally attending to `b' m c'` -> `b n c`; where b is k times b', every k in turn attend to one."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        # Frames that attend to one text are one sequence: its keys and values are neither repeated nor computed again.
        tokens = rearrange(hidden_states, "(b k) n c -> b (k n) c", b=context.shape[0])
        query, key, value = (
            self.split_heads(project(x))
            for project, x in ((self.to_q, tokens), (self.to_k, context), (self.to_v, context))
        )
        return self.project_out(self.attend(query, key, value)).view_as(hidden_states)


class SparseCausalAttention(Attention):
    r"""Spatio-temporal attention: frame `i` asks, a few other frames answer.

        Q = W^Q z_i,   K = W^K [z_1 ; z_{i-1}],   V = W^V [z_1 ; z_{i-1}]
        Attention(Q, K, V) = softmax(Q K^T / sqrt(d)) V

    (Tune-A-Video, equation 3: the first and the former frame, at a cost of `2 f n^2` instead of the `f^2 n^2` of full
    attention.) `attention` names other choices of frames; see `key_frames`.
    """

    def __init__(self, query_dim: int, attention: Sequence[str] = TUNE_A_VIDEO, **kwargs: Any) -> None:
        super().__init__(query_dim, **kwargs)
        self.attention = check_attention_frames(attention)

    def forward(self, hidden_states: torch.Tensor, num_frames: int) -> torch.Tensor:  # type: ignore[override]  # no text
        """`(b f) n c` -> `(b f) n c`, with `num_frames` = f."""
        query = self.split_heads(self.to_q(hidden_states))
        if self.attention == ("self",):
            key, value = self.split_heads(self.to_k(hidden_states)), self.split_heads(self.to_v(hidden_states))
            return self.project_out(self.attend(query, key, value))

        # Only the frames that somebody looks at are projected, and each of them once.
        sources = key_frames(self.attention, num_frames)
        seen = sorted({frame for source in sources for frame in source})
        slot = {frame: position for position, frame in enumerate(seen)}
        frames = _select(rearrange(hidden_states, "(b f) n c -> b f n c", f=num_frames), seen).flatten(1, 2)
        key, value = (
            rearrange(project(frames), "b (f n) (heads d) -> b f heads n d", heads=self.heads, f=len(seen))
            for project in (self.to_k, self.to_v)
        )
        query = rearrange(query, "(b f) heads n d -> b f heads n d", f=num_frames)
        if merges(query) and (not self.upcast or query.dtype == torch.float32):
            out = merged_attention(query, key, value, split_by_name(self.attention, sources, seen))
            return self.project_out(rearrange(out, "b f heads n d -> (b f) heads n d"))
        return self.project_out(self._attend_frames(query, key, value, sources, slot))

    def _attend_frames(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sources: list[tuple[int, ...]],
        slot: dict[int, int],
    ) -> torch.Tensor:
        """`b f heads n d`, keys and values of the seen frames -> `(b f) heads n d`."""
        num_frames = len(sources)
        if len(set(sources)) == 1:
            # One set of keys for all: the queries of all frames in one sequence, and no copy of the keys.
            shared = [slot[frame] for frame in sources[0]]
            out = self.attend(
                rearrange(query, "b f heads n d -> b heads (f n) d"),
                rearrange(key[:, shared], "b m heads n d -> b heads (m n) d"),
                rearrange(value[:, shared], "b m heads n d -> b heads (m n) d"),
            )
            return rearrange(out, "b heads (f n) d -> (b f) heads n d", f=num_frames)

        by_length = defaultdict(list)
        for frame, source in enumerate(sources):
            by_length[len(source)].append(frame)
        order, parts = [], []
        for frames in by_length.values():
            index = torch.tensor([[slot[s] for s in sources[frame]] for frame in frames], device=query.device)
            part = self.attend(
                rearrange(query[:, frames], "b f heads n d -> (b f) heads n d"),
                rearrange(key[:, index], "b f m heads n d -> (b f) heads (m n) d"),
                rearrange(value[:, index], "b f m heads n d -> (b f) heads (m n) d"),
            )
            order += frames
            parts.append(rearrange(part, "(b f) heads n d -> b f heads n d", f=len(frames)))
        out = torch.cat(parts, dim=1)
        if order != sorted(order):
            out = out[:, sorted(range(num_frames), key=order.__getitem__)]
        return rearrange(out, "b f heads n d -> (b f) heads n d")


class BasicTransformerBlock(nn.Module):
    """Spatio-temporal attention, cross-attention, feed-forward, temporal attention, each with norm and residual.

    The temporal attention is new to the image model. Its output projection starts at zero, weight and bias, so that an
    inflated model first does what the image model does; `temporal=False` leaves it out of the computation.
    """

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
        self.attn_temp.start_at_zero()

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, num_frames: int
    ) -> torch.Tensor:
        """`(b f) n c` and the text of each video, `b m c'` -> `(b f) n c`."""
        hidden_states = hidden_states + self.attn1(self.norm1(hidden_states), num_frames)
        hidden_states = hidden_states + self.attn2(self.norm2(hidden_states), encoder_hidden_states)
        hidden_states = hidden_states + self.ff(self.norm3(hidden_states))
        if self.temporal:
            positions = rearrange(hidden_states, "(b f) n c -> (b n) f c", f=num_frames)
            positions = positions + self.attn_temp(self.norm_temp(positions))
            n = hidden_states.shape[1]
            hidden_states = rearrange(positions, "(b n) f c -> (b f) n c", n=n)
        return hidden_states


class Transformer3DModel(nn.Module):
    """Group norm, projection in, transformer blocks, projection out, residual; the norm sees one frame at a time."""

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
        """`b c f h w` and the text `b m c'` -> `b c f h w`."""
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
