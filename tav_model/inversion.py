"""DDIM inversion: from clean latents to the noise that DDIM sampling turns into them (Song et al., arXiv 2010.02502)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMInverseScheduler

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from tav_model.networks.unet import UNet3DConditionModel


def ddim_changes(scheduler: SchedulerMixin) -> dict[str, Any]:
    """What DDIM there and back must have otherwise than the configuration of `scheduler`, which is of any class.

    Latents are not clipped to [-1, 1]: that is for images, but where a config says nothing of it, DDIM does. Timesteps
    by `linspace`, the choice of other samplers, become `leading`: DDIM's steps lead from each to the next only there
    and with `trailing`.
    """
    changes: dict[str, Any] = {"clip_sample": False}
    if scheduler.config.get("timestep_spacing") == "linspace":
        changes["timestep_spacing"] = "leading"
    return changes


@torch.no_grad()
def ddim_inversion(
    unet: UNet3DConditionModel,
    scheduler: SchedulerMixin,
    latents: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    num_steps: int,
    on_step: Callable[[], None] | None = None,
) -> torch.Tensor:
    """Follow the DDIM equation from `latents` towards noise, without guidance (eta 0).

    Each step, with `e` the noise that the model sees at the timestep it goes to, is equation 12 of the DDIM paper read
    backwards:

        x_next = sqrt(a_next) * (x - sqrt(1 - a) * e) / sqrt(a) + sqrt(1 - a_next) * e

    Where the model predicts the velocity `v`, `e = sqrt(a) * v + sqrt(1 - a) * x`.

    Args:
        scheduler: the base model's; its betas, prediction type and spacing are taken over (see `ddim_changes`).
        latents: clean latents, scaled, `b c f h w`.
        encoder_hidden_states: the text to invert under, `b n c` (Tune-A-Video: that of the empty prompt).
        on_step: called after each step.

    Returns:
        The trajectory, `(num_steps + 1) b c f h w`: it starts with `latents` and ends with the inverted latents.
    """
    inverse = DDIMInverseScheduler.from_config(scheduler.config, **ddim_changes(scheduler))
    inverse.set_timesteps(num_steps, device=latents.device)
    trajectory = [latents]
    encoder_hidden_states = encoder_hidden_states.to(unet.dtype)
    for timestep in inverse.timesteps:
        # The trajectory stays in its own precision, whatever the network's.
        prediction = unet(latents.to(unet.dtype), timestep, encoder_hidden_states).sample.to(latents.dtype)
        latents = inverse.step(prediction, timestep, latents).prev_sample
        trajectory.append(latents)
        if on_step is not None:
            on_step()
    return torch.stack(trajectory)
