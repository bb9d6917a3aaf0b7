"""The levels of the UNet: residual blocks and transformers, downwards, in the middle and upwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from tav_model.networks.attention_plan import TUNE_A_VIDEO
from tav_model.networks.resnet import Downsample3D, ResnetBlock3D, Upsample3D
from tav_model.networks.transformer import Transformer3DModel


@dataclass(frozen=True)
class LevelConfig:
    """The settings that the residual blocks and transformers of one level share."""

    temb_channels: int
    num_attention_heads: int = 8
    transformer_layers: int = 1
    cross_attention_dim: int = 768
    resnet_eps: float = 1e-5
    resnet_act_fn: str = "silu"
    resnet_groups: int = 32
    resnet_time_scale_shift: str = "default"
    output_scale_factor: float = 1.0
    dropout: float = 0.0
    use_linear_projection: bool = False
    upcast_attention: bool = False
    attention: tuple[str, ...] = TUNE_A_VIDEO
    temporal: bool = True

    def resnet(self, in_channels: int, out_channels: int) -> ResnetBlock3D:
        """Make a residual block."""
        return ResnetBlock3D(
            in_channels=in_channels,
            out_channels=out_channels,
            temb_channels=self.temb_channels,
            dropout=self.dropout,
            groups=self.resnet_groups,
            eps=self.resnet_eps,
            non_linearity=self.resnet_act_fn,
            time_embedding_norm=self.resnet_time_scale_shift,
            output_scale_factor=self.output_scale_factor,
        )

    def transformer(self, channels: int) -> Transformer3DModel:
        """Make a transformer, which has no dropout of its own, as in the image model."""
        return Transformer3DModel(
            self.num_attention_heads,
            channels // self.num_attention_heads,
            channels,
            self.cross_attention_dim,
            num_layers=self.transformer_layers,
            norm_num_groups=self.resnet_groups,
            use_linear_projection=self.use_linear_projection,
            upcast_attention=self.upcast_attention,
            attention=self.attention,
            temporal=self.temporal,
        )


class _Level(nn.Module):
    """A block whose layers can be checkpointed: computed again in the backward pass instead of keeping activations."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., torch.Tensor]  # diffusers sets both

    def run(self, layer: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """Call a layer, checkpointed where that is on."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(layer, *inputs)
        return layer(*inputs)


class DownBlock3D(_Level):
    """Residual blocks, then downsampling by 2."""

    has_cross_attention = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        config: LevelConfig,
        num_layers: int,
        add_downsample: bool,
        downsample_padding: int = 1,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            config.resnet(in_channels if layer == 0 else out_channels, out_channels) for layer in range(num_layers)
        )
        self.attentions = (
            nn.ModuleList(config.transformer(out_channels) for _ in range(num_layers))
            if self.has_cross_attention
            else None
        )
        self.downsamplers = (
            nn.ModuleList([Downsample3D(out_channels, padding=downsample_padding)]) if add_downsample else None
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        additional_residual: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return `b c' f h/2 w/2` for `b c f h w`, and the output of each layer for the skip connections.

        `additional_residual`, `b c' f h w`, is added to the output of the last layer, before downsampling.
        """
        residuals = []
        for layer, resnet in enumerate(self.resnets):
            hidden_states = self.run(resnet, hidden_states, temb)
            if self.attentions is not None:
                hidden_states = self.run(self.attentions[layer], hidden_states, encoder_hidden_states)
            if additional_residual is not None and layer == len(self.resnets) - 1:
                hidden_states = hidden_states + additional_residual.to(hidden_states.dtype)
            residuals.append(hidden_states)
        for downsample in self.downsamplers or ():
            hidden_states = self.run(downsample, hidden_states)
            residuals.append(hidden_states)
        return hidden_states, residuals


class CrossAttnDownBlock3D(DownBlock3D):
    """`DownBlock3D` with a transformer after each residual block."""

    has_cross_attention = True


class UNetMidBlock3DCrossAttn(_Level):
    """A residual block, a transformer and a residual block, at the smallest size."""

    def __init__(self, channels: int, config: LevelConfig) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(config.resnet(channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([config.transformer(channels)])

    def forward(
        self, hidden_states: torch.Tensor, temb: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """Return `b c f h w` for `b c f h w`."""
        hidden_states = self.run(self.resnets[0], hidden_states, temb)
        hidden_states = self.run(self.attentions[0], hidden_states, encoder_hidden_states)
        return self.run(self.resnets[1], hidden_states, temb)


class UpBlock3D(_Level):
    """Residual blocks, each with a skip connection from the same size on the way down, then upsampling by 2."""

    has_cross_attention = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        prev_output_channel: int,
        config: LevelConfig,
        num_layers: int,
        add_upsample: bool,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList()
        for layer in range(num_layers):
            hidden = prev_output_channel if layer == 0 else out_channels
            skip = in_channels if layer == num_layers - 1 else out_channels
            self.resnets.append(config.resnet(hidden + skip, out_channels))
        self.attentions = (
            nn.ModuleList(config.transformer(out_channels) for _ in range(num_layers))
            if self.has_cross_attention
            else None
        )
        self.upsamplers = nn.ModuleList([Upsample3D(out_channels)]) if add_upsample else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        residuals: list[torch.Tensor],
        temb: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
    ) -> torch.Tensor:
        """Return `b c' f 2h 2w` for `b c f h w`. Pops the skip connections that it uses off the end of `residuals`."""
        for layer, resnet in enumerate(self.resnets):
            hidden_states = self.run(resnet, torch.cat([hidden_states, residuals.pop()], dim=1), temb)
            if self.attentions is not None:
                hidden_states = self.run(self.attentions[layer], hidden_states, encoder_hidden_states)
        for upsample in self.upsamplers or ():
            # The size of the next skip connection: twice this one, or one less where downsampling rounded up.
            hidden_states = upsample(hidden_states, output_size=tuple(residuals[-1].shape[-2:]))
        return hidden_states


class CrossAttnUpBlock3D(UpBlock3D):
    """`UpBlock3D` with a transformer after each residual block."""

    has_cross_attention = True
