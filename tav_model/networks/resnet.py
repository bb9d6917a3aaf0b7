"""The convolutional layers of the image UNet, on videos: convolutions frame by frame, group norms over all frames."""

from __future__ import annotations

import torch
from diffusers.models.activations import get_activation
from einops import rearrange
from torch import nn
from torch.nn import functional

from tav_model.networks.memory_efficient import Conv2d, GroupNorm


class InflatedConv3d(Conv2d):
    """A 2D convolution of every frame: the image model's `k x k` kernel as a `1 x k x k` kernel."""

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        """Convolve each frame, `b c f h w` -> `b c' f h' w'`."""
        b = video.shape[0]
        frames = super().forward(rearrange(video, "b c f h w -> (b f) c h w"))
        return rearrange(frames, "(b f) c h w -> b c f h w", b=b)


class Upsample3D(nn.Module):
    """Nearest-neighbour upsampling of height and width, never of frames, then a 3x3 convolution."""

    def __init__(self, channels: int, out_channels: int | None = None) -> None:
        super().__init__()
        self.conv = InflatedConv3d(channels, out_channels or channels, 3, padding=1)

    def forward(self, video: torch.Tensor, output_size: tuple[int, int] | None = None) -> torch.Tensor:
        """Upsample `b c f h w` to `b c' f 2h 2w`, or to `output_size` (height, width) where downsampling rounded up."""
        f, h, w = video.shape[-3:]
        height, width = output_size or (2 * h, 2 * w)
        if torch.compiler.is_compiling() and (height, width) == (2 * h, 2 * w):
            # Compiled, `interpolate` is an index, whose deterministic backward pass sorts.
            copies = video[..., :, None, :, None].expand(*video.shape[:-2], h, 2, w, 2)
            return self.conv(copies.reshape(*video.shape[:-2], height, width))
        return self.conv(functional.interpolate(video, size=(f, height, width), mode="nearest"))


class Downsample3D(nn.Module):
    """A 3x3 convolution with stride 2, which halves height and width. With `padding=0`, it pads right and below only."""

    def __init__(self, channels: int, out_channels: int | None = None, padding: int = 1) -> None:
        super().__init__()
        self.padding = padding
        self.conv = InflatedConv3d(channels, out_channels or channels, 3, stride=2, padding=padding)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        """Downsample `b c f h w` to `b c' f h/2 w/2`, rounded up."""
        return self.conv(video if self.padding else functional.pad(video, (0, 1, 0, 1)))


class ResnetBlock3D(nn.Module):
    """Two 3x3 convolutions with a residual connection; the time embedding enters between them.

    The group norms take their statistics over all frames together, because their input is `b c f h w`.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int | None = None,
        temb_channels: int | None = 512,
        dropout: float = 0.0,
        groups: int = 32,
        eps: float = 1e-6,
        non_linearity: str = "swish",
        time_embedding_norm: str = "default",
        output_scale_factor: float = 1.0,
    ) -> None:
        super().__init__()
        out_channels = out_channels or in_channels
        if time_embedding_norm not in ("default", "scale_shift"):
            raise ValueError(f"time_embedding_norm: {time_embedding_norm!r} must be default or scale_shift")
        self.scale_shift = time_embedding_norm == "scale_shift"
        self.output_scale_factor = output_scale_factor
        self.norm1 = GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = InflatedConv3d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = (
            nn.Linear(temb_channels, out_channels * (2 if self.scale_shift else 1)) if temb_channels else None
        )
        self.norm2 = GroupNorm(groups, out_channels, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = InflatedConv3d(out_channels, out_channels, 3, padding=1)
        self.nonlinearity = get_activation(non_linearity)
        self.conv_shortcut = InflatedConv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, video: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        """Return `b c' f h w` for a video `b c f h w` and the time embedding `b e`."""
        hidden = self.conv1(self.norm1(video, self.nonlinearity))
        if self.time_emb_proj is not None:
            time = self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None, None]
            if self.scale_shift:
                scale, shift = time.chunk(2, dim=1)
                hidden = self.nonlinearity(self.norm2(hidden) * (1 + scale) + shift)
            else:
                hidden = self.norm2(hidden + time, self.nonlinearity)
        else:
            hidden = self.norm2(hidden, self.nonlinearity)
        hidden = self.conv2(self.dropout(hidden))
        shortcut = video if self.conv_shortcut is None else self.conv_shortcut(video)
        return (shortcut + hidden) / self.output_scale_factor
