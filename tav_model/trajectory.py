"""The source's latents at every noise level, read from the trajectory of its inversion."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers import DDIMInverseScheduler

from tav_model.frame_slices import by_frames
from tav_model.sampling import CLEAN, alpha_at

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

    from tav_model.tensors import StoredTensor


def inversion_timesteps(scheduler: DDIMScheduler, num_steps: int) -> list[int]:
    """Return the timesteps that the steps of DDIM inversion lead to, ascending.

    Raises:
        ValueError: more steps than timesteps.
    """
    inverse = DDIMInverseScheduler.from_config(scheduler.config)
    inverse.set_timesteps(num_steps)
    return inverse.timesteps.tolist()


class Trajectory:
    """The trajectory of an inversion, which gives the source's latents at any timestep.

    Sampling the source again with guidance would not lead back to it; the stored latents are exact at any guidance scale
    and cost nothing (TokenFlow, arXiv 2307.10373; PnP Inversion, arXiv 2310.01506).

    Args:
        latents: `(n + 1) 1 c f h w`, from the clean latents to the inverted ones, as `ddim_inversion` returns them. Those in a
            file are read when they are needed.
        scheduler: the one that samples; see `tav_model.inversion.ddim_overrides`.

    Raises:
        ValueError: latents of another shape.
    """

    def __init__(self, latents: torch.Tensor | StoredTensor, scheduler: DDIMScheduler) -> None:
        if latents.ndim != 6 or latents.shape[1] != 1 or len(latents) < 2:
            raise ValueError(f"trajectory: {tuple(latents.shape)} must be n + 1, 1, c, f, h, w")
        self.latents, self.scheduler = latents, scheduler
        self.timesteps = [CLEAN, *inversion_timesteps(scheduler, len(latents) - 1)]

    @property
    def inverted(self) -> torch.Tensor:
        """The last latents, `1 c f h w`."""
        return self.latents[-1].float()

    def start(
        self,
        layout_strength: float | None = None,
        timestep: int | None = None,
        mean_match: float = 0.0,
        deviation_match: float = 0.0,
    ) -> torch.Tensor:
        """Return the latents that an edit starts from, `1 c f h w`: those of a timestep, with a fixed share of the layout.

        Inverted latents are `m + b z + r`, by channel: their mean, a trace of the clean latents (`z`, with mean 0 and deviation
        1), and a residual of deviation s that looks like noise. The trace is what an edit keeps of the layout and motion.
        It is stronger the coarser and less exact the inversion is, so that an exact one loses track of the source. With a
        `layout_strength` l, it no longer depends on the inversion: deviation and residual stay, and the trace becomes l times
        as strong as the residual,

            x = m + d (l z + r / s) / sqrt(l^2 + 1),    with d the deviation of the inverted latents.

        The mean and the deviation are not those of noised latents either: a coarse inversion leaves too much of the clip's
        colours in the mean, and too small a deviation, which the network takes for less noise than there is. A `mean_match`
        u and a `deviation_match` w move them, by channel, towards those that the forward process has at the timestep,

            m' = (1 - u) m + u sqrt(a) m_0,    d' = d^(1 - w) (a d_0^2 + 1 - a)^(w / 2),

        with m_0 and d_0 those of the clean latents.

        Args:
            layout_strength: l; None: the latents as they are.
            timestep: None: that of the inverted latents.
            mean_match: u, from 0 to 1.
            deviation_match: w, from 0 to 1.
        """
        timestep = self.timesteps[-1] if timestep is None else timestep
        inverted = self.at(timestep)
        if layout_strength is None and not mean_match and not deviation_match:
            return inverted
        mean, spread = channel_mean(inverted), channel_deviation(inverted)
        centred = inverted - mean
        del inverted
        clean = self.latents[0].float()
        clean_mean, clean_deviation = channel_mean(clean), channel_deviation(clean)
        if layout_strength is None:
            centred /= spread
        else:
            layout = clean - clean_mean
            layout = layout / channel_deviation(layout)
            residual = centred - channel_mean(centred * layout) * layout
            mixed = layout_strength * layout + residual / channel_deviation(residual)
            centred = mixed / (layout_strength**2 + 1) ** 0.5
        del clean  # Of a long clip, each is large.
        alpha = float(alpha_at(self.scheduler, timestep))
        if mean_match:
            mean = torch.lerp(mean, alpha**0.5 * clean_mean, mean_match)
        if deviation_match:
            expected = (alpha * clean_deviation.square() + 1 - alpha) ** 0.5
            spread = spread ** (1 - deviation_match) * expected**deviation_match
        return by_frames(lambda centred: mean + spread * centred, centred, out=centred)

    def at(self, timestep: int) -> torch.Tensor:
        """Return the source's latents at a timestep, `1 c f h w` in float32.

        Between the timesteps of the inversion, `x / sqrt(a)` is interpolated over `sqrt(1 - a) / sqrt(a)`: it is what DDIM
        computes where the predicted noise does not change in between.

        Raises:
            ValueError: a timestep beyond that of the inverted latents.
        """
        timestep = max(timestep, CLEAN)
        if timestep in self.timesteps:
            return self.latents[self.timesteps.index(timestep)].float()
        above = next((i for i, known in enumerate(self.timesteps) if known > timestep), None)
        if above is None:
            raise ValueError(f"timestep: {timestep} is beyond the last of the inversion, {self.timesteps[-1]}")
        roots = [
            alpha_at(self.scheduler, t) ** 0.5 for t in (self.timesteps[above - 1], timestep, self.timesteps[above])
        ]
        sigmas = [(1 - root**2) ** 0.5 / root for root in roots]
        share = ((sigmas[1] - sigmas[0]) / (sigmas[2] - sigmas[0])).clamp(0, 1)
        low, high = self.latents[above - 1].float() / roots[0], self.latents[above].float() / roots[2]
        return by_frames(lambda low, high: roots[1] * torch.lerp(low, high, share.to(low)), low, high, out=low)


def channel_mean(latents: torch.Tensor) -> torch.Tensor:
    """Return the mean of each channel, `b c f h w` -> `b c 1 1 1`."""
    return latents.mean((2, 3, 4), keepdim=True)


def channel_deviation(latents: torch.Tensor) -> torch.Tensor:
    """Return the standard deviation of each channel, above 0, `b c f h w` -> `b c 1 1 1`."""
    tiny = torch.finfo(torch.float32).tiny
    return latents.std((2, 3, 4), keepdim=True, correction=0).clamp(min=tiny)
