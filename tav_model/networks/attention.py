"""Multi-head attention over a video's tokens (Tune-A-Video, arXiv 2212.11565, section 3.2).

Tokens are `(b f) n c`: `n = h * w` positions of `f` frames of `b` videos.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import nn

from tav_model.networks.attention_plan import TUNE_A_VIDEO, attention_plan, check_attention_frames
from tav_model.networks.dot_product_attention import attend, attend_to_frames, select_frames


class Attention(nn.Module):
    """Multi-head attention, `softmax(Q K^T / sqrt(d)) V`, within a sequence or to the tokens of another one.

    `upcast` computes the products in float32, which Stable Diffusion 2.1 needs in half precision.
    """

    attend = staticmethod(attend)  # `tav_model.attention_control` replaces it in single layers.

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

    def zero_output(self) -> None:
        """Set the output projection to zero, so that the layer adds nothing until it is trained."""
        for parameter in self.to_out[0].parameters():
            nn.init.zeros_(parameter)

    def project_out(self, tokens: torch.Tensor) -> torch.Tensor:
        """Apply the output projection and dropout, `... n (heads d)` -> `... n c`."""
        projection, dropout = self.to_out
        return dropout(projection(tokens))

    def project_context(self, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of `b m c`. `tav_model.networks.text_projections` replaces it in single layers."""
        return self.to_k(context), self.to_v(context)

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None) -> torch.Tensor:
        """Attend from `b n c` to `b' m c'` (by default to itself), and return `b n c`.

        Where b is k times b', each k consecutive sequences attend to the same one.
        """
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        # Frames that attend to one text form one sequence: its keys and values are neither repeated nor computed again.
        tokens = rearrange(hidden_states, "(b k) n c -> b (k n) c", b=context.shape[0])
        query, key, value = (
            rearrange(projected, "b n (heads d) -> b heads n d", heads=self.heads)
            for projected in (self.to_q(tokens), *self.project_context(context))
        )
        out = self.attend(query, key, value, self.upcast)
        return self.project_out(rearrange(out, "b heads n d -> b n (heads d)")).view_as(hidden_states)


class SparseCausalAttention(Attention):
    r"""Spatio-temporal attention: each frame `z_i` attends to a few frames, by default the first and the former one.

        Q = W^Q z_i,   K = W^K [z_1 ; z_{i-1}],   V = W^V [z_1 ; z_{i-1}]
        Attention(Q, K, V) = softmax(Q K^T / sqrt(d)) V

    (Tune-A-Video, equation 3.) For `f` frames of `n` positions this costs `2 f n^2`, full attention `f^2 n^2`.
    `attention` names the frames in the order of concatenation, see `tav_model.networks.attention_plan`.
    """

    def __init__(self, query_dim: int, attention: Sequence[str] = TUNE_A_VIDEO, **kwargs: Any) -> None:
        super().__init__(query_dim, **kwargs)
        self.attention = check_attention_frames(attention)

    def forward(self, hidden_states: torch.Tensor, num_frames: int) -> torch.Tensor:  # type: ignore[override]  # no text
        """Attend across the frames of each video, `(b f) n c` -> `(b f) n c`, with `num_frames` = f."""
        plan = attention_plan(self.attention, num_frames)
        # Only the frames that some frame attends to are projected to keys and values, each of them once.
        frames = rearrange(hidden_states, "(b f) n c -> b f n c", f=num_frames)
        context = select_frames(frames, plan.projected).flatten(1, 2)
        query = rearrange(self.to_q(hidden_states), "(b f) n (h d) -> b f h n d", f=num_frames, h=self.heads)
        key, value = (
            rearrange(projected, "b (k n) (h d) -> b k h n d", k=len(plan.projected), h=self.heads)
            for projected in (self.to_k(context), self.to_v(context))
        )
        out = attend_to_frames(query, key, value, plan, self.upcast)
        return self.project_out(rearrange(out, "b f h n d -> (b f) n (h d)"))
