"""Reuse of deep features in consecutive steps (DeepCache, Ma et al., arXiv 2312.00858).

From one step to the next, the features deep in the network change little. In every k-th step all of the network is computed.
In the steps between, only its outermost layers are: the first convolution and the last layer of the last level, which gets
the deep features of the last full step.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch

from tav_model.compiling import uncompiled

if TYPE_CHECKING:
    from tav_model.networks.unet import UNet3DConditionModel


class FeatureReuse:
    """Predictions of a network in the steps of one sampling, most of which compute little.

    Args:
        unet: the network.
        interval: k, the steps from one full computation to the next; 1: always.
    """

    def __init__(self, unet: UNet3DConditionModel, interval: int) -> None:
        self.unet, self.interval = unet, interval
        self._features: torch.Tensor | None = None
        self._rows: Hashable = None
        self._age = 0

    def __call__(
        self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, rows: Hashable, **residuals: Any
    ) -> torch.Tensor:
        """Return the prediction for the next step, `b c f h w`.

        Args:
            sample: noisy latents, `b c f h w`.
            timestep: of all rows.
            text: `b n c`.
            rows: what the rows of the batch are. Where it differs from the step before, all is computed.
            residuals: of control networks, see `UNet3DConditionModel.forward`.
        """
        self._age += 1
        if self.interval > 1 and self._features is not None and rows == self._rows and self._age < self.interval:
            return self._outermost_layers(sample, timestep, text, residuals, self._features)
        self._age, self._rows = 0, rows
        if self.interval == 1:
            return self.unet(sample, timestep, text, **residuals).sample
        handle = self._last_level.resnets[-1].register_forward_pre_hook(self._keep)
        try:
            with uncompiled(self.unet):
                return self.unet(sample, timestep, text, **residuals).sample
        finally:
            handle.remove()

    @property
    def _last_level(self) -> Any:
        return self.unet.up_blocks[-1]

    def _keep(self, _: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        """Keep what comes from below in the input of the last layer, `b (c + c') f h w`: all but its skip connection."""
        self._features = inputs[0][:, : -self.unet.conv_in.out_channels]

    def _outermost_layers(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        residuals: dict[str, Any],
        features: torch.Tensor,
    ) -> torch.Tensor:
        unet, level = self.unet, self._last_level
        first, temb = unet.embed(sample, timestep)
        # The last layer's skip connection is the output of the first convolution.
        if residuals.get("down_block_additional_residuals") is not None:
            first = first + residuals["down_block_additional_residuals"][0].to(first.dtype)
        hidden_states = level.resnets[-1](torch.cat([features, first], dim=1), temb)
        if level.attentions is not None:
            hidden_states = level.attentions[-1](hidden_states, text)
        return unet.project_out(hidden_states)
