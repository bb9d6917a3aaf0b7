"""`UNet3DConditionModel`: the Stable Diffusion UNet inflated to video (Tune-A-Video, arXiv 2212.11565, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.activations import get_activation
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils import BaseOutput
from torch import nn

from tav_model.errors import TavError
from tav_model.networks.attention_plan import TUNE_A_VIDEO, check_attention_frames
from tav_model.networks.inflation import inflate, load_inflated
from tav_model.networks.memory_efficient import GroupNorm
from tav_model.networks.resnet import InflatedConv3d
from tav_model.networks.unet_blocks import (
    CrossAttnDownBlock3D,
    CrossAttnUpBlock3D,
    DownBlock3D,
    LevelConfig,
    UNetMidBlock3DCrossAttn,
    UpBlock3D,
)
from tav_model.tuned_weights import TRAINABLE_MODULES, load_tuned, save_tuned, trainable_parameters

DOWN_BLOCKS = {"DownBlock3D": DownBlock3D, "CrossAttnDownBlock3D": CrossAttnDownBlock3D}
UP_BLOCKS = {"UpBlock3D": UpBlock3D, "CrossAttnUpBlock3D": CrossAttnUpBlock3D}
MID_BLOCKS = {"UNetMidBlock3DCrossAttn": UNetMidBlock3DCrossAttn}


@dataclass
class UNet3DConditionOutput(BaseOutput):
    """Output of `UNet3DConditionModel`.

    Attributes:
        sample: the predicted noise or velocity, `b c f h w`.
    """

    sample: torch.Tensor


class UNet3DConditionModel(ModelMixin, ConfigMixin):
    """Predict the noise (or the velocity) in the latents of a video, given the timestep and the text.

    The arguments are those of diffusers' `UNet2DConditionModel` that Stable Diffusion 1 and 2 use, and two of its own.

    Args:
        attention: the frames that each frame's keys and values come from, see `tav_model.networks.attention_plan`.
        temporal: whether the temporal attention `attn_temp` takes part.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("BasicTransformerBlock", "ResnetBlock3D")

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 4,
        out_channels: int = 4,
        center_input_sample: bool = False,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: Sequence[str] = ("CrossAttnDownBlock3D",) * 3 + ("DownBlock3D",),
        mid_block_type: str = "UNetMidBlock3DCrossAttn",
        up_block_types: Sequence[str] = ("UpBlock3D",) + ("CrossAttnUpBlock3D",) * 3,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int | Sequence[int] = 2,
        downsample_padding: int = 1,
        mid_block_scale_factor: float = 1.0,
        dropout: float = 0.0,
        act_fn: str = "silu",
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int | Sequence[int] = 1280,
        transformer_layers_per_block: int | Sequence[int] = 1,
        attention_head_dim: int | Sequence[int] = 8,
        use_linear_projection: bool = False,
        upcast_attention: bool = False,
        resnet_time_scale_shift: str = "default",
        attention: Sequence[str] = TUNE_A_VIDEO,
        temporal: bool = True,
    ) -> None:
        super().__init__()
        levels = len(block_out_channels)
        if not levels == len(down_block_types) == len(up_block_types):
            raise ValueError(
                f"as many down_block_types ({len(down_block_types)}) and up_block_types ({len(up_block_types)}) "
                f"as block_out_channels ({levels}) are needed"
            )

        def per_level(name: str, value: Any) -> list[Any]:
            values = list(value) if isinstance(value, (list, tuple)) else [value] * levels
            if len(values) != levels:
                raise ValueError(f"{name}: {value} must be one value, or one for each of the {levels} levels")
            return values

        layers = per_level("layers_per_block", layers_per_block)
        # For Stable Diffusion, diffusers' `attention_head_dim` is the number of heads; the misnomer is kept in all configs.
        heads = per_level("attention_head_dim", attention_head_dim)
        context_dims = per_level("cross_attention_dim", cross_attention_dim)
        transformer_layers = per_level("transformer_layers_per_block", transformer_layers_per_block)
        first, last = block_out_channels[0], block_out_channels[-1]
        temb_channels = 4 * first

        def level(i: int, output_scale_factor: float = 1.0) -> LevelConfig:
            return LevelConfig(
                temb_channels=temb_channels,
                num_attention_heads=heads[i],
                transformer_layers=transformer_layers[i],
                cross_attention_dim=context_dims[i],
                resnet_eps=norm_eps,
                resnet_act_fn=act_fn,
                resnet_groups=norm_num_groups,
                resnet_time_scale_shift=resnet_time_scale_shift,
                output_scale_factor=output_scale_factor,
                dropout=dropout,
                use_linear_projection=use_linear_projection,
                upcast_attention=upcast_attention,
                attention=check_attention_frames(attention),
                temporal=temporal,
            )

        self.conv_in = InflatedConv3d(in_channels, first, 3, padding=1)
        self.time_proj = Timesteps(first, flip_sin_to_cos, freq_shift)
        self.time_embedding = TimestepEmbedding(first, temb_channels, act_fn=act_fn)

        self.down_blocks = nn.ModuleList(
            _block_class(DOWN_BLOCKS, kind)(
                block_out_channels[max(i - 1, 0)],
                block_out_channels[i],
                level(i),
                num_layers=layers[i],
                add_downsample=i < levels - 1,
                downsample_padding=downsample_padding,
            )
            for i, kind in enumerate(down_block_types)
        )
        self.mid_block = _block_class(MID_BLOCKS, mid_block_type)(last, level(-1, mid_block_scale_factor))
        self.up_blocks = nn.ModuleList(
            _block_class(UP_BLOCKS, kind)(
                block_out_channels[max(i - 1, 0)],
                block_out_channels[i],
                block_out_channels[min(i + 1, levels - 1)],
                level(i),
                num_layers=layers[i] + 1,
                add_upsample=i > 0,
            )
            for i, kind in zip(reversed(range(levels)), up_block_types, strict=True)
        )
        self.conv_norm_out = GroupNorm(norm_num_groups, first, eps=norm_eps)
        self.conv_act = get_activation(act_fn)
        self.conv_out = InflatedConv3d(first, out_channels, 3, padding=1)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor,
        return_dict: bool = True,
        down_block_additional_residuals: Sequence[torch.Tensor] | None = None,
        mid_block_additional_residual: torch.Tensor | None = None,
        down_intrablock_additional_residuals: Sequence[torch.Tensor] | None = None,
    ) -> UNet3DConditionOutput | tuple[torch.Tensor]:
        """Predict the noise or the velocity.

        Args:
            sample: noisy latents, `b c f h w`.
            timestep: one number for all, or `(b,)`.
            encoder_hidden_states: text embeddings, `b n c'`.
            return_dict: return a `UNet3DConditionOutput` rather than a tuple.
            down_block_additional_residuals: added to the skip connections, as many as there are (ControlNet, arXiv
                2302.05543); each `b c' f h' w'`, or of a shape that broadcasts to it.
            mid_block_additional_residual: added to the output of the middle block.
            down_intrablock_additional_residuals: added to the last layer of each level on the way down, at most one for
                each (T2I-Adapter, arXiv 2302.08453).

        Raises:
            ValueError: shapes that do not fit the model or each other.
        """
        self._check_shapes(sample, timestep, encoder_hidden_states)
        hidden_states, temb = self.embed(sample, timestep)
        residuals = [hidden_states]
        intrablock = _one_for_each_level(down_intrablock_additional_residuals, len(self.down_blocks))
        for block, additional_residual in zip(self.down_blocks, intrablock, strict=True):
            hidden_states, block_residuals = block(hidden_states, temb, encoder_hidden_states, additional_residual)
            residuals += block_residuals
        if down_block_additional_residuals is not None:
            _add(residuals, down_block_additional_residuals)
        hidden_states = self.mid_block(hidden_states, temb, encoder_hidden_states)
        if mid_block_additional_residual is not None:
            hidden_states = hidden_states + mid_block_additional_residual.to(hidden_states.dtype)
        for block in self.up_blocks:
            hidden_states = block(hidden_states, residuals, temb, encoder_hidden_states)
        prediction = self.project_out(hidden_states)

        return UNet3DConditionOutput(sample=prediction) if return_dict else (prediction,)

    def embed(self, sample: torch.Tensor, timestep: torch.Tensor | float | int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the first features of noisy latents, `b c' f h w`, and the embedding of the timestep, `b c''`."""
        if self.config.center_input_sample:
            sample = 2 * sample - 1.0
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        # Sines in float32, whatever the network's own precision.
        temb = self.time_embedding(self.time_proj(timesteps).to(sample.dtype))
        return self.conv_in(sample), temb

    def project_out(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the prediction, `b c f h w`, for the last features, `b c' f h w`."""
        return self.conv_out(self.conv_norm_out(hidden_states, self.conv_act))

    def _check_shapes(self, sample: torch.Tensor, timestep: Any, text: torch.Tensor) -> None:
        if sample.ndim != 5 or sample.shape[1] != self.config.in_channels:
            raise ValueError(f"sample: {tuple(sample.shape)} must be b {self.config.in_channels} f h w")
        if text.ndim != 3 or text.shape[0] != sample.shape[0]:
            raise ValueError(f"encoder_hidden_states: {tuple(text.shape)} must be {sample.shape[0]} n c")
        if torch.is_tensor(timestep) and timestep.shape not in ((), (1,), (sample.shape[0],)):
            raise ValueError(f"timestep: {tuple(timestep.shape)} must be one number or ({sample.shape[0]},)")

    # Loading and saving

    @classmethod
    def from_pretrained_2d(
        cls,
        path: str | Path,
        subfolder: str | None = "unet",
        attention: Sequence[str] = TUNE_A_VIDEO,
        temporal: bool = True,
        **kwargs: Any,
    ) -> Self:
        """Inflate the image UNet in a folder or of a hub id: see `tav_model.networks.inflation.load_inflated`."""
        return load_inflated(cls, path, subfolder, attention, temporal, **kwargs)

    @classmethod
    def from_unet2d(
        cls, image_unet: UNet2DConditionModel, attention: Sequence[str] = TUNE_A_VIDEO, temporal: bool = True
    ) -> Self:
        """Inflate an image UNet, whose weights are shared: see `tav_model.networks.inflation.inflate`."""
        return inflate(cls, image_unet, attention, temporal)

    def trainable_parameters(self, modules: Iterable[str] = TRAINABLE_MODULES) -> dict[str, nn.Parameter]:
        """Return the parameters of `modules` by name: see `tav_model.tuned_weights.trainable_parameters`."""
        return trainable_parameters(self, modules)

    def save_tuned(self, folder: str | Path, modules: Iterable[str] = TRAINABLE_MODULES, **information: Any) -> None:
        """Write the tuned weights alone: see `tav_model.tuned_weights.save_tuned`."""
        save_tuned(self, folder, modules, information)

    def load_tuned(self, folder: str | Path) -> dict[str, Any]:
        """Read tuned weights and return their description: see `tav_model.tuned_weights.load_tuned`."""
        return load_tuned(self, folder)


def _one_for_each_level(residuals: Sequence[torch.Tensor] | None, levels: int) -> list[torch.Tensor | None]:
    given = list(residuals or ())
    if len(given) > levels:
        raise ValueError(f"down_intrablock_additional_residuals: {len(given)} for {levels} levels")
    return [*given, *[None] * (levels - len(given))]


def _add(residuals: list[torch.Tensor], additional: Sequence[torch.Tensor]) -> None:
    """Replace each of the residuals by its sum with an additional one, in its own precision: autocast would raise it."""
    if len(additional) != len(residuals):
        raise ValueError(
            f"down_block_additional_residuals: {len(additional)} for {len(residuals)} skip connections; "
            "they are of another model"
        )
    for i, residual in enumerate(additional):
        residuals[i] = residuals[i] + residual.to(residuals[i].dtype)


def _block_class(blocks: Mapping[str, Callable[..., nn.Module]], name: str) -> Callable[..., nn.Module]:
    if name not in blocks:
        raise TavError(f"a UNet with a block of type {name} cannot be inflated; allowed: {', '.join(blocks)}")
    return blocks[name]
