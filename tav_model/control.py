"""Control signals: edges, depth or a pose of every frame, which ControlNets and T2I-Adapters turn into residuals.

A ControlNet (Zhang et al., arXiv 2302.05543) is a copy of the UNet's way down. It sees the noisy latents, the text and a
picture of the condition, and its outputs are added to the UNet's skip connections. A T2I-Adapter (Mou et al., arXiv
2302.08453) sees the condition alone; its maps are added once to each level. Both are image networks: here they see the
frames one by one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, T2IAdapter
from einops import rearrange
from PIL import Image
from torch import nn

from tav_model.control_networks import control_networks, pixels_per_latent
from tav_model.errors import TavError
from tav_model.windows import Window, select

# Weights of red, green and blue in a luminance (ITU-R BT.601), for networks that see a single channel.
LUMINANCE = (0.299, 0.587, 0.114)


class ControlSignal:
    """What steers a video: control networks, the frames of their conditions, and when and how strongly they act.

    A network whose scale is 0, or that is outside its interval, does not run and leaves no trace in the result.

    Args:
        network: a `ControlNetModel`, a `T2IAdapter`, or several of them as a list or a `MultiControlNetModel`. The sum of
            their residuals is used.
        conditioning_frames: see `to_condition`; for several networks, a list with those of each.
        controlnet_conditioning_scale: factor of the residuals, one for all networks or one for each.
        control_guidance_start: share of the sampling steps after which a network begins to act.
        control_guidance_end: share of the sampling steps after which it acts no longer.
        guess_mode: residuals grow from a tenth at the first level to full strength in the middle, and leave predictions
            under negative prompts as they are; for ControlNets without a prompt.
        chunk_size: frames that a network sees at a time, which bounds the memory.

    Raises:
        TavError: conditions that are no frames, or of different lengths.
        ValueError: numbers of conditions, scales or intervals that do not fit the networks, or are not allowed.
    """

    def __init__(
        self,
        network: nn.Module | Sequence[nn.Module],
        conditioning_frames: Any,
        controlnet_conditioning_scale: float | Sequence[float] = 1.0,
        control_guidance_start: float | Sequence[float] = 0.0,
        control_guidance_end: float | Sequence[float] = 1.0,
        guess_mode: bool = False,
        chunk_size: int = 16,
    ) -> None:
        self.networks = control_networks(network)
        count = len(self.networks)
        if chunk_size < 1:
            raise ValueError(f"chunk_size: {chunk_size} must be at least 1")
        self.scales = _one_for_each("controlnet_conditioning_scale", controlnet_conditioning_scale, count)
        starts = _one_for_each("control_guidance_start", control_guidance_start, count)
        ends = _one_for_each("control_guidance_end", control_guidance_end, count)
        for start, end in zip(starts, ends, strict=True):
            if not 0 <= start < end <= 1:
                raise ValueError(
                    f"control_guidance_start: {start} must be at least 0 and less than control_guidance_end, "
                    f"which is {end} and must be at most 1"
                )
        self.intervals = list(zip(starts, ends, strict=True))
        self.guess_mode, self.chunk_size = guess_mode, chunk_size
        self.conditions = [
            _of_channels(condition, _condition_channels(network)).to(network.device, network.dtype)
            for network, condition in zip(self.networks, _conditions(conditioning_frames, count), strict=True)
        ]
        lengths = sorted({condition.shape[2] for condition in self.conditions})
        if len(lengths) > 1:
            raise TavError(f"conditioning_frames: {lengths[0]} of one network, but {lengths[-1]} of another")
        self._adapter_maps: dict[int, list[torch.Tensor]] = {}
        self._embeddings: dict[int, torch.Tensor] = {}

    @property
    def num_frames(self) -> int:
        """The number of frames of the conditions."""
        return self.conditions[0].shape[2]

    def check_size(self, num_videos: int, num_frames: int, height: int, width: int) -> None:
        """Check that the conditions fit videos in number and size.

        Args:
            num_videos: how many videos are controlled. Conditions may be one for all, or one for each.
            num_frames: of each video.
            height: of the latents.
            width: of the latents.

        Raises:
            TavError: other numbers or sizes.
        """
        for network, condition in zip(self.networks, self.conditions, strict=True):
            factor = pixels_per_latent(network)
            n, _, f, h, w = condition.shape
            if (f, h, w) != (num_frames, height * factor, width * factor):
                raise TavError(
                    f"conditioning_frames: {f} frames of {w}x{h} pixels, but the video has {num_frames} frames of "
                    f"{width * factor}x{height * factor}"
                )
            if n not in (1, num_videos):
                raise TavError(f"conditioning_frames: those of {n} videos, for {num_videos}")

    @torch.no_grad()
    def residuals(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor,
        step: int | torch.Tensor,
        num_steps: int,
        num_unconditional: int = 0,
        window: Window | None = None,
    ) -> dict[str, Any]:
        """Return the arguments of `UNet3DConditionModel.forward` that add the control, none where no network acts.

        Args:
            sample: noisy latents, `b c f h w`, as the UNet receives them.
            timestep: one number for all, or `(b,)`.
            encoder_hidden_states: text embeddings, `b n c`.
            step: which of the sampling steps this is, from 0, the noisiest; one number for all, or `(b,)`.
            num_steps: how many sampling steps there are.
            num_unconditional: how many videos at the beginning of the batch are not under prompts. In guess mode,
                their residuals are zero.
            window: the frames that `sample` has of the video; None: all.
        """
        down: list[torch.Tensor] = []
        mid: torch.Tensor | None = None
        intrablock: list[torch.Tensor] = []
        for i, network in enumerate(self.networks):
            scale = self._scale(i, step, num_steps)
            if not scale.any():
                continue
            scale = scale.to(sample.device, sample.dtype).view(-1, 1, 1, 1, 1)
            if isinstance(network, T2IAdapter):
                maps = [scale * _for_batch(one, len(sample)).to(sample) for one in self._maps(i, window)]
                intrablock = _sum(intrablock, maps)
                continue
            *others, middle = self._controlnet_residuals(
                i, sample, timestep, encoder_hidden_states, scale, num_unconditional, window
            )
            down = _sum(down, others)
            mid = middle if mid is None else mid + middle
        arguments: dict[str, Any] = {}
        if mid is not None:
            arguments |= {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        if intrablock:
            arguments["down_intrablock_additional_residuals"] = intrablock
        return arguments

    def _scale(self, i: int, step: int | torch.Tensor, num_steps: int) -> torch.Tensor:
        """Return the scale of network i at a step, 0 outside its interval: a number, or `(b,)` for steps `(b,)`."""
        start, end = self.intervals[i]
        steps = torch.as_tensor(step, dtype=torch.float64)
        inside = (steps / num_steps >= start) & ((steps + 1) / num_steps <= end)
        return self.scales[i] * inside

    def _maps(self, i: int, window: Window | None = None) -> list[torch.Tensor]:
        """Return the maps of adapter i, each `n c f h w`.

        They do not depend on the timestep, so they are kept, except for those of windows, which together would be large.
        """
        if window is not None:
            return self._computed_maps(i, select(self.conditions[i], window))
        if i not in self._adapter_maps:
            self._adapter_maps[i] = self._computed_maps(i, self.conditions[i])
        return self._adapter_maps[i]

    def _embedding(self, i: int, b: int, window: Window | None) -> torch.Tensor:
        """Return the embedded condition of ControlNet i, `(n f) c h w`, for a batch of b videos.

        It does not depend on the timestep either, and takes a good part of a small network's time, so it is kept, except for
        that of windows.
        """
        _check_batch(len(self.conditions[i]), b)
        if window is not None:
            return self._computed_embedding(i, select(self.conditions[i], window))
        if i not in self._embeddings:
            self._embeddings[i] = self._computed_embedding(i, self.conditions[i])
        return self._embeddings[i]

    def _computed_embedding(self, i: int, condition: torch.Tensor) -> torch.Tensor:
        network = self.networks[i]
        # The network flips the channels of what it is given, which is then the embedding.
        flipped = [1] if network.config.controlnet_conditioning_channel_order == "bgr" else []
        chunks = _folded(condition).flip(flipped).split(self.chunk_size)
        return torch.cat([network.controlnet_cond_embedding(chunk).flip(flipped) for chunk in chunks])

    def _computed_maps(self, i: int, condition: torch.Tensor) -> list[torch.Tensor]:
        chunks = [self.networks[i](chunk) for chunk in _folded(condition).split(self.chunk_size)]
        return [
            rearrange(torch.cat(parts), "(n f) c h w -> n c f h w", n=len(condition))
            for parts in zip(*chunks, strict=True)
        ]

    def _controlnet_residuals(
        self,
        i: int,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor,
        scale: torch.Tensor,
        num_unconditional: int,
        window: Window | None,
    ) -> Iterator[torch.Tensor]:
        """Yield the scaled residuals of ControlNet i, `b c f h w`: of the skip connections, then of the middle."""
        network: ControlNetModel = self.networks[i]
        # A network that pools its residuals over the picture was trained for guess mode, as in diffusers.
        guess = self.guess_mode or network.config.global_pool_conditions
        left_out = num_unconditional if guess else 0
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(len(sample))[left_out:]
        videos, text = sample[left_out:], encoder_hidden_states[left_out:]
        b, f = videos.shape[0], videos.shape[2]
        frames = _folded(videos).to(network.dtype)
        embedding = self._embedding(i, b, window)
        places = torch.arange(b * f, device=embedding.device) % len(embedding)  # One condition may be for all videos.
        text = text.to(network.dtype).repeat_interleave(f, 0)
        timesteps = timesteps.repeat_interleave(f, 0)

        outputs: list[torch.Tensor] = []
        for first in range(0, b * f, self.chunk_size):
            chunk = slice(first, first + self.chunk_size)
            with _embedded_conditions(network):
                down, mid = network(
                    frames[chunk],
                    timesteps[chunk],
                    text[chunk],
                    embedding[places[chunk]],
                    guess_mode=guess,
                    return_dict=False,
                )
            if not outputs:
                outputs = [part.new_empty(b * f, *part.shape[1:]) for part in (*down, mid)]
            for output, part in zip(outputs, (*down, mid), strict=True):
                output[chunk] = part
        for output in outputs:
            residual = rearrange(output, "(b f) c h w -> b c f h w", b=b).to(sample.dtype)
            if left_out:
                residual = torch.cat([residual.new_zeros(left_out, *residual.shape[1:]), residual])
            yield residual.mul_(scale)  # In place: together they are large.


def to_condition(frames: Any) -> torch.Tensor:
    """Return the frames of a condition as a tensor `n 3 f h w` in [0, 1].

    Args:
        frames: a tensor `3 f h w` or `n 3 f h w` in [0, 1], an array `f h w 3` or `n f h w 3` in uint8 or in [0, 1], or a
            list of PIL images. n is 1, or as many as there are videos.

    Raises:
        TavError: something else, or values outside [0, 1].
    """
    shapes = "a tensor `3 f h w`, an array `f h w 3` or a list of images, in [0, 1] or uint8"
    if isinstance(frames, (list, tuple)) and frames and all(isinstance(frame, Image.Image) for frame in frames):
        if len({frame.size for frame in frames}) > 1:
            raise TavError("conditioning_frames: images of different sizes")
        frames = np.stack([np.asarray(frame.convert("RGB")) for frame in frames])
    if isinstance(frames, np.ndarray):
        if frames.ndim not in (4, 5) or frames.shape[-1] != 3:
            raise TavError(f"conditioning_frames: an array {frames.shape} must be {shapes}")
        frames = torch.from_numpy(np.ascontiguousarray(np.moveaxis(frames, -1, -4)))
    if not isinstance(frames, torch.Tensor) or frames.ndim not in (4, 5) or frames.shape[-4] != 3:
        what = tuple(frames.shape) if isinstance(frames, torch.Tensor) else type(frames).__name__
        raise TavError(f"conditioning_frames: {what} must be {shapes}")
    if 0 in frames.shape:
        raise TavError(f"conditioning_frames: {tuple(frames.shape)} has no pixels")
    condition = frames.float() / 255 if frames.dtype == torch.uint8 else frames.float()
    low, high = (value.item() for value in condition.aminmax())
    if not (low >= 0 and high <= 1):
        raise TavError(f"conditioning_frames: values from {low:.4g} to {high:.4g} must be in [0, 1]")
    return condition if condition.ndim == 5 else condition[None]


def _conditions(frames: Any, count: int) -> list[torch.Tensor]:
    """Return the condition of each of `count` networks."""
    if count == 1:
        return [to_condition(frames)]
    if not isinstance(frames, (list, tuple)) or len(frames) != count:
        given = len(frames) if isinstance(frames, (list, tuple)) else "those of one"
        raise ValueError(
            f"conditioning_frames: {given}, but there are {count} networks; give a list with those of each"
        )
    return [to_condition(one) for one in frames]


def _one_for_each(name: str, value: float | Sequence[float], count: int) -> list[float]:
    values: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise ValueError(f"{name}: {len(values)} for {count} networks")
    for number in values:
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise ValueError(f"{name}: {number!r} must be a number")
    return [float(number) for number in values]


def _condition_channels(network: Any) -> int:
    config = network.config
    return config.in_channels if isinstance(network, T2IAdapter) else config.conditioning_channels


def _of_channels(condition: torch.Tensor, channels: int) -> torch.Tensor:
    if channels == 1:
        weights = condition.new_tensor(LUMINANCE).view(3, 1, 1, 1)
        return (condition * weights).sum(1, keepdim=True)
    return condition


def _folded(videos: torch.Tensor) -> torch.Tensor:
    return rearrange(videos, "b c f h w -> (b f) c h w")


@contextlib.contextmanager
def _embedded_conditions(network: ControlNetModel) -> Iterator[None]:
    """Let a ControlNet take conditions that are embedded already."""
    embed = network.controlnet_cond_embedding
    network.controlnet_cond_embedding = nn.Identity()
    try:
        yield
    finally:
        network.controlnet_cond_embedding = embed


def _check_batch(n: int, b: int) -> None:
    """Check that there are conditions for a batch of b videos: n is 1 or divides b, which guidance doubles.

    Raises:
        ValueError: other numbers.
    """
    if b % n:
        raise ValueError(f"conditioning_frames: those of {n} videos, for a batch of {b}; give one for all")


def _for_batch(condition: torch.Tensor, b: int) -> torch.Tensor:
    """Return conditions `n c f h w` for a batch of b videos, see `_check_batch`."""
    n = len(condition)
    _check_batch(n, b)
    return condition.expand(b, -1, -1, -1, -1) if n == 1 else condition.repeat(b // n, 1, 1, 1, 1)


def _sum(total: list[torch.Tensor], more: list[torch.Tensor]) -> list[torch.Tensor]:
    return [one + other for one, other in zip(total, more, strict=True)] if total else more
