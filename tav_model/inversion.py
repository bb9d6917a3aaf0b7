"""DDIM inversion: from clean latents to the noise that DDIM sampling turns back into them (arXiv 2010.02502)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMInverseScheduler

from tav_model.frame_slices import by_frames
from tav_model.noise_regularization import regularized
from tav_model.sampling import predicted_clean_and_noise
from tav_model.windows import Window, WindowOptions, predict_in_windows, select

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
    *,
    iterations: int = 1,
    tolerance: float = 1e-3,
    regularization: float = 0.0,
    on_residual: Callable[[float], None] | None = None,
    window: WindowOptions | None = None,
) -> torch.Tensor:
    """Follow the DDIM equation from `latents` towards noise, without guidance (eta 0).

    Each step is equation 12 of the DDIM paper read backwards, with `e` the model's prediction of the noise at the
    timestep that the step leads to:

        x_next = sqrt(a_next) * (x - sqrt(1 - a) * e) / sqrt(a) + sqrt(1 - a_next) * e

    Where the model predicts the velocity `v`, `e = sqrt(a) * v + sqrt(1 - a) * x`.

    Sampling takes `e` at `x_next`, so the exact inverse of its step is a fixed point of this equation. Plain DDIM inversion
    is one iteration, from `x_next = x`. More of them, up to `iterations`, approach the fixed point (AIDI, arXiv 2309.04907;
    ReNoise, arXiv 2403.14602), and sampling under the same prompt leads back to `latents`.

    Args:
        unet: the tuned model.
        scheduler: the base model's, which sets the betas, prediction type and spacing (see `ddim_overrides`).
        latents: clean latents, scaled, `b c f h w`.
        encoder_hidden_states: embeddings of the prompt to invert under, `b n c` (Tune-A-Video: the empty prompt).
        num_steps: steps from `latents` to noise.
        on_step: called after each step.
        control: steers the predictions as in sampling: the last steps of the inversion are the first of the sampling.
        iterations: evaluations of the model in each step, at most.
        tolerance: a step ends early once an iteration changes the latents by less than this share of their norm.
        regularization: strength of `tav_model.noise_regularization`, 0 to 0.5, on the predicted noise. Sampling then does not
            lead back to `latents` exactly.
        on_residual: called after each step with the share of their norm by which the last iteration changed the latents.
        window: the network sees a long clip in windows, which must be those of the sampling.

    Returns:
        The trajectory, `(num_steps + 1) b c f h w`, from `latents` to the inverted latents.

    Raises:
        ValueError: no iterations, a strength that is not allowed, or more steps than timesteps.
    """
    states = inversion_states(
        unet,
        scheduler,
        latents,
        encoder_hidden_states,
        num_steps,
        on_step,
        control,
        iterations=iterations,
        tolerance=tolerance,
        regularization=regularization,
        on_residual=on_residual,
        window=window,
    )
    return torch.stack(list(states))


@torch.no_grad()
def inversion_states(
    unet: UNet3DConditionModel,
    scheduler: SchedulerMixin,
    latents: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    num_steps: int,
    on_step: Callable[[], None] | None = None,
    control: ControlSignal | None = None,
    *,
    iterations: int = 1,
    tolerance: float = 1e-3,
    regularization: float = 0.0,
    on_residual: Callable[[float], None] | None = None,
    window: WindowOptions | None = None,
) -> Iterator[torch.Tensor]:
    """Yield the trajectory of `ddim_inversion` state by state, `b c f h w`, so that it need not fit into memory.

    The arguments are those of `ddim_inversion`.
    """
    if iterations < 1:
        raise ValueError(f"iterations: {iterations} must be at least 1")
    if not 0 <= regularization <= 0.5:
        raise ValueError(f"regularization: {regularization} must be from 0 to 0.5")
    inverse = DDIMInverseScheduler.from_config(scheduler.config, **ddim_overrides(scheduler))
    inverse.set_timesteps(num_steps, device=latents.device)
    if control is not None:
        control.check_size(len(latents), *latents.shape[2:])
    encoder_hidden_states = encoder_hidden_states.to(unet.dtype)
    yield latents

    for step, timestep in enumerate(inverse.timesteps):

        def predict(latents: torch.Tensor, timestep: torch.Tensor = timestep, step: int = step) -> torch.Tensor:
            def of_window(part: Window | None) -> torch.Tensor:
                # The trajectory keeps the precision of `latents`, whatever the network's is.
                sample, residuals = select(latents, part).to(unet.dtype), {}
                if control is not None:
                    residuals = control.residuals(
                        sample, timestep, encoder_hidden_states, num_steps - 1 - step, num_steps, window=part
                    )
                return unet(sample, timestep, encoder_hidden_states, **residuals).sample.to(latents.dtype)

            return predict_in_windows(of_window, latents.shape[2], window)

        inverse_step = _InverseStep(inverse, timestep, latents, predict, regularization)
        following = inverse_step(latents) if regularization else inverse_step.plain()
        if iterations > 1:
            following, residual = _fixed_point(inverse_step, following, iterations - 1, tolerance)
            if on_residual is not None:
                on_residual(residual)
        latents = following
        if on_step is not None:
            on_step()
        yield latents


class _InverseStep:
    """One step of the DDIM equation read backwards, with the model's prediction at the latents that it leads to."""

    def __init__(
        self,
        inverse: DDIMInverseScheduler,
        timestep: torch.Tensor,
        latents: torch.Tensor,
        predict: Callable[[torch.Tensor], torch.Tensor],
        regularization: float,
    ) -> None:
        self.inverse, self.timestep, self.latents = inverse, timestep, latents
        self.predict, self.regularization = predict, regularization
        train_timesteps = inverse.config.num_train_timesteps
        source = min(int(timestep) - train_timesteps // inverse.num_inference_steps, train_timesteps - 1)
        # As `DDIMInverseScheduler.step` has it.
        self.alpha = inverse.alphas_cumprod[source] if source >= 0 else inverse.initial_alpha_cumprod
        self.alpha_next = inverse.alphas_cumprod[int(timestep)]

    def plain(self) -> torch.Tensor:
        """Return the next latents, by the noise that the model predicts in those before."""
        prediction = self.predict(self.latents)
        return by_frames(
            lambda output, sample: self.inverse.step(output, self.timestep, sample).prev_sample,
            prediction,
            self.latents,
            out=prediction,
        )

    def __call__(self, following: torch.Tensor) -> torch.Tensor:
        """Return the next latents, by the noise that the model predicts in `following`."""
        prediction = self.predict(following)
        _, noise = predicted_clean_and_noise(self.inverse, prediction, int(self.timestep), following)
        noise = regularized(noise, self.regularization)
        clean = (self.latents - (1 - self.alpha) ** 0.5 * noise) / self.alpha**0.5
        return self.alpha_next**0.5 * clean + (1 - self.alpha_next) ** 0.5 * noise


def _fixed_point(
    function: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, iterations: int, tolerance: float
) -> tuple[torch.Tensor, float]:
    """Iterate `x <- function(x)` until x changes by less than `tolerance`, relative to the norm of `start`.

    Where an iteration changes x by more than the one before, the iterates diverge, and the one before is returned, so that
    further iterations do not make it worse.

    Returns:
        The result, and the last change.
    """
    previous, current, change = start, start, float("inf")
    for _ in range(iterations):
        following = function(current)
        new_change = float((following - current).norm() / start.norm())
        if new_change > change or not math.isfinite(new_change):
            return previous, change
        previous, current, change = current, following, new_change
        if change < tolerance:
            break
    return current, change
