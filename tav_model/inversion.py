"""DDIM inversion: from clean latents to the noise that DDIM sampling turns back into them (arXiv 2010.02502)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMInverseScheduler

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from tav_model.control import ControlSignal
    from tav_model.networks.unet import UNet3DConditionModel


def ddim_overrides(scheduler: SchedulerMixin) -> dict[str, Any]:
    """Return the config overrides that make DDIM sampling reverse the inversion, for the config of any scheduler.

    Latents are not clipped to [-1, 1]. Clipping is for images, but it is DDIM's default where a config does not mention
    it. The timestep spacing `linspace`, which other samplers use, becomes `leading`, because only with `leading` and
    `trailing` does each step of DDIM end at the timestep where the next one begins.
    """
    overrides: dict[str, Any] = {"clip_sample": False}
    if scheduler.config.get("timestep_spacing") == "linspace":
        overrides["timestep_spacing"] = "leading"
    return overrides


@torch.no_grad()
def ddim_inversion(
    unet: UNet3DConditionModel,
    scheduler: SchedulerMixin,
    latents: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    num_steps: int,
    on_step: Callable[[], None] | None = None,
    control: ControlSignal | None = None,
) -> torch.Tensor:
    """Follow the DDIM equation from `latents` towards noise, without guidance (eta 0).

    Each step is equation 12 of the DDIM paper read backwards, with `e` the model's prediction of the noise at the
    timestep that the step leads to:

        x_next = sqrt(a_next) * (x - sqrt(1 - a) * e) / sqrt(a) + sqrt(1 - a_next) * e

    Where the model predicts the velocity `v`, `e = sqrt(a) * v + sqrt(1 - a) * x`.

    Args:
        unet: the tuned model.
        scheduler: the base model's, which sets the betas, prediction type and spacing (see `ddim_overrides`).
        latents: clean latents, scaled, `b c f h w`.
        encoder_hidden_states: embeddings of the prompt to invert under, `b n c` (Tune-A-Video: the empty prompt).
        num_steps: steps from `latents` to noise.
        on_step: called after each step.
        control: steers the predictions as in sampling: the last steps of the inversion are the first of the sampling.

    Returns:
        The trajectory, `(num_steps + 1) b c f h w`, from `latents` to the inverted latents.
    """
    inverse = DDIMInverseScheduler.from_config(scheduler.config, **ddim_overrides(scheduler))
    inverse.set_timesteps(num_steps, device=latents.device)
    trajectory = [latents]
    if control is not None:
        control.check_size(len(latents), *latents.shape[2:])
    encoder_hidden_states = encoder_hidden_states.to(unet.dtype)
    for step, timestep in enumerate(inverse.timesteps):
        # The trajectory keeps the precision of `latents`, whatever the network's is.
        sample, residuals = latents.to(unet.dtype), {}
        if control is not None:
            residuals = control.residuals(sample, timestep, encoder_hidden_states, num_steps - 1 - step, num_steps)
        prediction = unet(sample, timestep, encoder_hidden_states, **residuals).sample.to(latents.dtype)
        latents = inverse.step(prediction, timestep, latents).prev_sample
        trajectory.append(latents)
        if on_step is not None:
            on_step()
    return torch.stack(trajectory)
