"""`UNet3DConditionModel`: the Stable Diffusion UNet inflated to video (Tune-A-Video, arXiv 2212.11565, section 3.2)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.activations import get_activation
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils import BaseOutput
from torch import nn

from tav_model import tuned_weights as tuned
from tav_model.errors import TavError
from tav_model.networks.attention import TUNE_A_VIDEO, BasicTransformerBlock, check_attention_frames
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
from tav_model.weight_checks import check_files, check_loaded, quiet, reason

DOWN_BLOCKS = {"DownBlock3D": DownBlock3D, "CrossAttnDownBlock3D": CrossAttnDownBlock3D}
UP_BLOCKS = {"UpBlock3D": UpBlock3D, "CrossAttnUpBlock3D": CrossAttnUpBlock3D}
MID_BLOCKS = {"UNetMidBlock3DCrossAttn": UNetMidBlock3DCrossAttn}


@dataclass
class UNet3DConditionOutput(BaseOutput):
    """`sample`: what the network predicts, `b c f h w`."""

    sample: torch.Tensor


class UNet3DConditionModel(ModelMixin, ConfigMixin):
    """Predicts the noise (or the velocity) in the latents of a video, told the timestep and the text.

    The arguments are those of diffusers' `UNet2DConditionModel`, as far as Stable Diffusion 1 and 2 use them, and

    Args:
        attention: the frames that each frame's keys and values come from, see `tav_model.networks.attention.key_frames`.
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
        # Diffusers' `attention_head_dim` is, for Stable Diffusion, the number of heads: the old name of a mistake.
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
    ) -> UNet3DConditionOutput | tuple[torch.Tensor]:
        """One prediction.

        Args:
            sample: noisy latents, `b c f h w`.
            timestep: one number for all, or `(b,)`.
            encoder_hidden_states: text embeddings, `b n c'`.

        Raises:
            ValueError: shapes that do not fit the model or each other.
        """
        self._check_shapes(sample, timestep, encoder_hidden_states)
        if self.config.center_input_sample:
            sample = 2 * sample - 1.0

        timesteps = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        # Sines in float32, whatever the network's own precision.
        temb = self.time_embedding(self.time_proj(timesteps).to(sample.dtype))

        hidden_states = self.conv_in(sample)
        residuals = [hidden_states]
        for block in self.down_blocks:
            hidden_states, left = block(hidden_states, temb, encoder_hidden_states)
            residuals += left
        hidden_states = self.mid_block(hidden_states, temb, encoder_hidden_states)
        for block in self.up_blocks:
            hidden_states = block(hidden_states, residuals, temb, encoder_hidden_states)
        prediction = self.conv_out(self.conv_norm_out(hidden_states, self.conv_act))

        return UNet3DConditionOutput(sample=prediction) if return_dict else (prediction,)

    def _check_shapes(self, sample: torch.Tensor, timestep: Any, text: torch.Tensor) -> None:
        if sample.ndim != 5 or sample.shape[1] != self.config.in_channels:
            raise ValueError(f"sample: {tuple(sample.shape)} must be b {self.config.in_channels} f h w")
        if text.ndim != 3 or text.shape[0] != sample.shape[0]:
            raise ValueError(f"encoder_hidden_states: {tuple(text.shape)} must be {sample.shape[0]} n c")
        if torch.is_tensor(timestep) and timestep.shape not in ((), (1,), (sample.shape[0],)):
            raise ValueError(f"timestep: {tuple(timestep.shape)} must be one number or ({sample.shape[0]},)")

    # Loading the image model

    @classmethod
    def from_pretrained_2d(
        cls,
        path: str | Path,
        subfolder: str | None = "unet",
        attention: Sequence[str] = TUNE_A_VIDEO,
        temporal: bool = True,
        **kwargs: Any,
    ) -> UNet3DConditionModel:
        """Inflate the image UNet in a folder of diffusers' layout (`.safetensors` or `.bin`) or of a hub id.

        Args:
            kwargs: for `UNet2DConditionModel.from_pretrained`, such as `torch_dtype`, `variant`, `revision`.

        Raises:
            TavError: no such model, not one of Stable Diffusion's shape, weights missing, surplus or not finite.
        """
        if Path(path).exists():
            kwargs.setdefault("local_files_only", True)
            check_files(Path(path) / (subfolder or ""))
        try:
            with quiet():
                image_unet, loading = UNet2DConditionModel.from_pretrained(
                    path, subfolder=subfolder, output_loading_info=True, **kwargs
                )
        except Exception as error:  # On damaged files, diffusers fails in any way it happens to.
            raise TavError(f"{path}: no image UNet can be loaded from it ({reason(error)})") from error
        try:
            check_loaded(image_unet, loading)
        except TavError as error:
            raise TavError(f"{path}: its image UNet: {error}") from None
        try:
            return cls.from_unet2d(image_unet, attention=attention, temporal=temporal)
        except TavError as error:
            raise TavError(f"{path}: {error}") from None

    @classmethod
    def from_unet2d(
        cls, image_unet: UNet2DConditionModel, attention: Sequence[str] = TUNE_A_VIDEO, temporal: bool = True
    ) -> UNet3DConditionModel:
        """Inflate an image UNet; its weights are shared, not copied. In eval mode, as `from_pretrained` gives.

        Raises:
            TavError: the UNet uses something that Stable Diffusion 1 and 2 do not have.
        """
        config = inflate_config(image_unet.config) | {"attention": list(attention), "temporal": temporal}
        with torch.device("meta"):
            unet = cls.from_config(config)
        unet.load_state_dict(image_unet.state_dict(), strict=False, assign=True)
        for module in unet.modules():
            if isinstance(module, BasicTransformerBlock):
                _materialise_temporal(module, image_unet.dtype, image_unet.device)
        left = [name for name, tensor in unet.state_dict().items() if tensor.is_meta]
        surplus = image_unet.state_dict().keys() - unet.state_dict().keys()
        if left or surplus:
            raise TavError(f"not the UNet of a Stable Diffusion model: {sorted([*left, *surplus])[0]} does not fit")
        return unet.eval()

    # The tuned part

    def trainable_parameters(self, modules: Iterable[str] = tuned.TRAINABLE_MODULES) -> dict[str, nn.Parameter]:
        """The parameters of every module whose dotted name ends with one of `modules`, by state-dict name.

        `attn_temp` selects nothing where `temporal` is off.

        Raises:
            TavError: a name that fits no module.
        """
        modules = tuple(modules)
        found: dict[str, nn.Parameter] = {}
        matched = set()
        for name, module in self.named_modules():
            for pattern in modules:
                if f".{name}".endswith(f".{pattern}"):
                    matched.add(pattern)
                    if self.config.temporal or ".attn_temp" not in f".{name}":
                        found |= {f"{name}.{key}": value for key, value in module.named_parameters()}
        unmatched = [pattern for pattern in modules if pattern not in matched or not pattern]
        if unmatched or not found:
            raise TavError(
                f"trainable: {', '.join(map(repr, unmatched)) or modules} selects no parameter of this model"
            )
        # In the order of the state dict, whatever the order of the patterns.
        return {name: value for name, value in self.named_parameters() if name in found}

    def save_tuned(
        self, folder: str | Path, modules: Iterable[str] = tuned.TRAINABLE_MODULES, **information: Any
    ) -> None:
        """Write the tuned weights alone: see `tav_model.tuned_weights.save`."""
        tuned.save(self, folder, tuple(modules), information)

    def load_tuned(self, folder: str | Path) -> dict[str, Any]:
        """Read tuned weights into this model; returns what `tuned.json` says: see `tav_model.tuned_weights.load`."""
        return tuned.load(self, folder)


def inflate_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a 2D UNet as one of `UNet3DConditionModel`.

    Raises:
        TavError: it asks for something that Stable Diffusion 1 and 2 do not have.
    """
    ours = inspect.signature(UNet3DConditionModel.__init__).parameters
    theirs = inspect.signature(UNet2DConditionModel.__init__).parameters
    inflated = {}
    for key, value in config.items():
        if key in ours:
            inflated[key] = value
        elif key in theirs and value != theirs[key].default:
            # Switched-off features may be spelt as False, or as a list of False.
            if not value or (isinstance(value, (list, tuple)) and not any(value)):
                continue
            raise TavError(f"a UNet with {key}={value!r} is not of Stable Diffusion's shape and cannot be inflated")
    for key in ("down_block_types", "up_block_types"):
        inflated[key] = [name.replace("2D", "3D") for name in inflated[key]]
    inflated["mid_block_type"] = (inflated.get("mid_block_type") or "none").replace("2D", "3D")
    return inflated


def _block_class(blocks: Mapping[str, Callable[..., nn.Module]], kind: str) -> Callable[..., nn.Module]:
    if kind not in blocks:
        raise TavError(f"a UNet with a block of type {kind} cannot be inflated; allowed: {', '.join(blocks)}")
    return blocks[kind]


def _materialise_temporal(block: BasicTransformerBlock, dtype: torch.dtype, device: torch.device) -> None:
    """Give the modules that inflation adds their first weights: random, and zero at the output."""
    for module in (block.norm_temp, block.attn_temp):
        module.to_empty(device=device).to(dtype)
        for layer in module.modules():
            if isinstance(layer, nn.Linear | nn.LayerNorm):
                layer.reset_parameters()
    block.attn_temp.start_at_zero()
