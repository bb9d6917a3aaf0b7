"""Samplers: the noise levels of an edit and the step from one to the next, by DDIM or DPM-Solver++(2M)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tav_model.frame_slices import by_frames

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

CLEAN = -1
"""The timestep after the last one: that of clean latents."""


def alpha_at(scheduler: DDIMScheduler, timestep: int) -> torch.Tensor:
    """Return the cumulative product of the alphas at a timestep; before timestep 0 it is that of clean latents."""
    return scheduler.alphas_cumprod[timestep] if timestep >= 0 else scheduler.final_alpha_cumprod


def predicted_clean_and_noise(
    scheduler: DDIMScheduler, model_output: torch.Tensor, timestep: int, sample: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the clean latents and the noise that the model's output means, whatever it predicts.

    `x = sqrt(a) x0 + sqrt(1 - a) e` and `v = sqrt(a) e - sqrt(1 - a) x0` (arXiv 2202.00512) are solved for both.
    """
    alpha = alpha_at(scheduler, timestep)
    root, noise_root = alpha**0.5, (1 - alpha) ** 0.5
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return (sample - noise_root * model_output) / root, model_output
    if kind == "v_prediction":
        return root * sample - noise_root * model_output, root * model_output + noise_root * sample
    if kind == "sample":
        return model_output, (sample - root * model_output) / noise_root
    raise ValueError(f"prediction_type: {kind!r} must be epsilon, v_prediction or sample")


class DDIMSampler:
    """Denoising diffusion implicit models (arXiv 2010.02502).

    Args:
        scheduler: sets the betas, the prediction type and the spacing.
        num_steps: number of steps.
        first_timestep: the timestep that the first latents belong to. Where the scheduler would start at another one, the
            timesteps are spread evenly from here to the scheduler's last.

    Attributes:
        timesteps: of each step, descending.
        next_timesteps: the timestep that each step leads to; `CLEAN` or another negative number after the last one.

    Raises:
        ValueError: more steps than timesteps.
    """

    def __init__(self, scheduler: DDIMScheduler, num_steps: int, first_timestep: int | None = None) -> None:
        self.scheduler = scheduler
        scheduler.set_timesteps(num_steps)
        self.timesteps: list[int] = scheduler.timesteps.tolist()
        if first_timestep is None or first_timestep == self.timesteps[0]:
            stride = scheduler.config.num_train_timesteps // num_steps
            self.next_timesteps = [timestep - stride for timestep in self.timesteps]
        else:
            self.timesteps = _evenly_spaced(first_timestep, min(self.timesteps[-1], first_timestep), num_steps)
            self.next_timesteps = [*self.timesteps[1:], CLEAN]

    def step(
        self,
        model_output: torch.Tensor,
        step: int,
        sample: torch.Tensor,
        eta: float = 0.0,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the latents after a step, by equation 12 of the paper.

            x_next = sqrt(a_next) x0 + sqrt(1 - a_next - s^2) e + s noise
            s = eta sqrt((1 - a_next) / (1 - a)) sqrt(1 - a / a_next)

        Args:
            model_output: the guided prediction, of the shape of `sample`; that of a long clip is overwritten.
            step: number of the step, from 0.
            sample: the latents at `timesteps[step]`.
            eta: 0 is deterministic, and `noise` is not needed.
            noise: standard normal, of the shape of `sample`.
        """
        timestep = self.timesteps[step]
        alpha, alpha_next = alpha_at(self.scheduler, timestep), alpha_at(self.scheduler, self.next_timesteps[step])
        deviation = eta * ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)) ** 0.5

        def following(model_output: torch.Tensor, sample: torch.Tensor, *noise: torch.Tensor) -> torch.Tensor:
            clean, epsilon = predicted_clean_and_noise(self.scheduler, model_output, timestep, sample)
            result = alpha_next**0.5 * clean + (1 - alpha_next - deviation**2) ** 0.5 * epsilon
            return result + deviation * noise[0] if noise else result

        noises = [] if eta == 0 or noise is None else [noise]
        return by_frames(following, model_output, sample, *noises, out=model_output)


class DPMSolverSampler(DDIMSampler):
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), which needs about half as many steps as DDIM.

    It starts from latents of DDIM inversion as DDIM does, at the same timesteps. Its first step is DDIM's.
    """

    FEW_STEPS = 15  # As in the paper's code: with fewer, the last step is of first order, which is more stable.
    _last_clean: torch.Tensor | None = None
    _last_h: torch.Tensor | None = None

    def step(
        self,
        model_output: torch.Tensor,
        step: int,
        sample: torch.Tensor,
        eta: float = 0.0,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the latents after a step; steps must follow one another.

            x_next = s_next / s x - sqrt(a_next) (exp(-h) - 1) D,   D = x0 + (x0 - x0_last) h / (2 h_last)

        with `s = sqrt(1 - a)` and `h` the change of `log(sqrt(a) / s)`, half the logarithm of the signal-to-noise ratio.

        Raises:
            ValueError: `eta` is not 0.
        """
        if eta:
            raise ValueError(f"eta: {eta} must be 0 with DPM-Solver++")
        timestep = self.timesteps[step]
        alpha, alpha_next = (alpha_at(self.scheduler, t).double() for t in (timestep, self.next_timesteps[step]))
        h = _log_snr(alpha_next) - _log_snr(alpha)
        final = step == len(self.timesteps) - 1
        first_order = final and (len(self.timesteps) < self.FEW_STEPS or bool(alpha_next == 1))
        slope = None if step == 0 or self._last_h is None or first_order else h / self._last_h / 2
        shrink = ((1 - alpha_next) / (1 - alpha)) ** 0.5
        growth = -(alpha_next**0.5) * torch.expm1(-h)
        if self._last_clean is None:
            self._last_clean = torch.empty_like(sample, dtype=torch.result_type(sample, model_output))

        def following(model_output: torch.Tensor, sample: torch.Tensor, last_clean: torch.Tensor) -> torch.Tensor:
            clean, _ = predicted_clean_and_noise(self.scheduler, model_output, timestep, sample)
            direction = clean if slope is None else clean + slope.to(clean.dtype) * (clean - last_clean)
            last_clean.copy_(clean)
            return shrink.to(sample.dtype) * sample + growth.to(sample.dtype) * direction

        self._last_h = h
        return by_frames(following, model_output, sample, self._last_clean, out=model_output)


SAMPLERS = {"ddim": DDIMSampler, "dpm-solver++": DPMSolverSampler}
"""The samplers by name."""


def first_sampled_step(strength: float, num_steps: int) -> int:
    """Return the first of the steps that are sampled: their share `strength`, the last ones.

    Raises:
        ValueError: there would be none.
    """
    first = num_steps - round(strength * num_steps)
    if first == num_steps:
        raise ValueError(f"strength: {strength} of {num_steps} steps leaves none")
    return first


def _log_snr(alpha: torch.Tensor) -> torch.Tensor:
    """Return half the logarithm of the signal-to-noise ratio, infinity for clean latents."""
    return (torch.log(alpha) - torch.log1p(-alpha)) / 2


def _evenly_spaced(first: int, last: int, num: int) -> list[int]:
    if num > first - last + 1:
        raise ValueError(f"num_inference_steps: {num} from timestep {first}; at most {first - last + 1}")
    if num == 1:
        return [first]
    return [round(first + (last - first) * i / (num - 1)) for i in range(num)]
