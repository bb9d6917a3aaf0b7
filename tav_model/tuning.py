"""One-shot tuning: the standard diffusion loss on the latents of a clip (Tune-A-Video, arXiv 2212.11565, section 3.3)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.nn import functional

from tav_model.allocator import FreedMemory
from tav_model.checkpoints import Checkpoints
from tav_model.errors import TavError
from tav_model.low_rank import add_low_rank
from tav_model.muon import Muon
from tav_model.networks.memory_efficient import is_large
from tav_model.networks.resnet import ResnetBlock3D
from tav_model.networks.transformer import Transformer3DModel
from tav_model.tuned_weights import TRAINABLE_MODULES
from tav_model.windows import Window, WindowOptions, select, without_anchor

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from tav_model.control import ControlSignal
    from tav_model.networks.unet import UNet3DConditionModel

# A loss so many times the first one's means that tuning has failed: a prediction of zero has a loss of about 1.
EXPLODED = 1000
OPTIMIZERS = ("adamw", "muon")
TIMESTEP_SAMPLINGS = ("uniform", "stratified", "cubic", "logit-normal")
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
# The held-out loss, for early stopping: steps between two measurements, draws in each, and the share by which a loss must be
# lower than the lowest before to count as an improvement.
HELD_OUT_EVERY, HELD_OUT_DRAWS, IMPROVEMENT = 20, 8, 0.01
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class TuningConfig:
    """Settings of a tuning. The defaults are the paper's.

    `precision` is that of matrix products and convolutions, and of frozen matrices and kernels in memory. Trained weights,
    their gradients and the loss stay in float32. A step is one update, after `accumulation_steps` backward passes. With a
    `lora_rank`, low-rank updates of the trained modules are trained instead, see `tav_model.low_rank`. With
    `window`, each pass of a longer clip sees a window drawn at random.

    Attributes:
        optimizer: "adamw"; or "muon", for which the learning rate has the same scale, see `tav_model.muon`.
        timestep_sampling: "uniform"; "stratified": evenly spread over any number of consecutive steps; "cubic": more at high
            noise, as in the training of T2I-Adapters (arXiv 2302.08453); "logit-normal": more in the middle (Esser et al.,
            arXiv 2403.03206).
        motion_weight: share of the loss that is the one of motion alone, see `diffusion_loss`.
        early_stopping: steps without a lower loss on held-out noise after which tuning ends; 0: it never ends early.
    """

    steps: int = 500
    learning_rate: float = 3e-5
    learning_rate_schedule: str = "constant"
    warmup_steps: int = 0
    accumulation_steps: int = 1
    precision: str = "float32"
    gradient_checkpointing: bool = False
    max_gradient_norm: float = 1.0
    weight_decay: float = 1e-2
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    trainable: tuple[str, ...] = TRAINABLE_MODULES
    lora_rank: int = 0
    optimizer: str = "adamw"
    timestep_sampling: str = "uniform"
    motion_weight: float = 0.0
    early_stopping: int = 0
    seed: int = 33
    window: WindowOptions | None = None


class StepRecord(NamedTuple):
    """Measurements of one step.

    `updated` is 0 where float16 overflowed: the loss scale was halved, and the weights did not change.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    timestep: float
    updated: float


def diffusion_loss(
    unet: UNet3DConditionModel,
    scheduler: SchedulerMixin,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    control: ControlSignal | None = None,
    motion_weight: float = 0.0,
    anchor: int = 0,
    window: Window | None = None,
) -> torch.Tensor:
    """Return `|| target - prediction(sqrt(a_t) x + sqrt(1 - a_t) e, t, text) ||^2`, averaged over all elements, in float32.

    The target is the noise `e` (Ho et al., arXiv 2006.11239) or the velocity `sqrt(a_t) e - sqrt(1 - a_t) x` (Salimans
    and Ho, arXiv 2202.00512), depending on the scheduler's `prediction_type`.

    With a `motion_weight` w it is `(1 - w)` times that plus w times the same loss of `sqrt(2) y - y_anchor` in place of target
    and prediction y: the difference from an anchor frame has little of what all frames share, their appearance (MotionDirector,
    arXiv 2310.08465, equation 7, with beta = 1).

    Args:
        unet: the model.
        scheduler: the base model's.
        latents: `x`, `b c f h w`.
        noise: `e`, `b c f h w`.
        timesteps: `(b,)`.
        encoder_hidden_states: `b n c`.
        control: steers the prediction, at the timesteps of its interval.
        motion_weight: w, from 0 to 1.
        anchor: index of the anchor frame.
        window: the frames that these latents are of a longer clip. The loss leaves out its anchor, as sampling does.

    Raises:
        TavError: the scheduler has another prediction type.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        target = noise
    elif kind == "v_prediction":
        target = scheduler.get_velocity(latents, noise, timesteps)
    else:
        raise TavError(f"prediction_type: {kind!r} cannot be tuned; allowed: epsilon, v_prediction")
    noisy, residuals = scheduler.add_noise(latents, noise, timesteps), {}
    if control is not None:
        # Sampling in as many steps as there are timesteps: its first step is at the last timestep.
        limit = scheduler.config.num_train_timesteps
        steps = limit - 1 - timesteps.cpu()
        residuals = control.residuals(noisy, timesteps, encoder_hidden_states, steps, limit, window=window)
    prediction = unet(noisy, timesteps, encoder_hidden_states, **residuals).sample
    prediction, target = (without_anchor(one, window).float() for one in (prediction, target))
    loss = functional.mse_loss(prediction, target)
    if motion_weight:
        prediction, target = (2**0.5 * y - y[:, :, anchor : anchor + 1] for y in (prediction, target))
        loss = torch.lerp(loss, functional.mse_loss(prediction, target), motion_weight)
    return loss


class Tuner:
    """Tunes `unet` on a clip: `step` is one update, `fit` all of them, with checkpoints.

    With `control`, it is tuned under that signal, whose networks stay as they are.

    In half precision, the frozen weights of `unet` are cast in place.

    Attributes:
        parameters: the trained parameters by name.
        history: the records of the steps so far.
        held_out: the loss on held-out noise after some of the steps, as (step, loss), with early stopping.
    """

    def __init__(
        self,
        unet: UNet3DConditionModel,
        scheduler: SchedulerMixin,
        config: TuningConfig,
        control: ControlSignal | None = None,
    ) -> None:
        for name, value, allowed in (
            ("precision", config.precision, tuple(PRECISIONS)),
            ("optimizer", config.optimizer, OPTIMIZERS),
            ("timestep_sampling", config.timestep_sampling, TIMESTEP_SAMPLINGS),
        ):
            if value not in allowed:
                raise TavError(f"{name}: {value!r} must be one of {', '.join(allowed)}")
        self.unet, self.scheduler, self.config, self.control = unet, scheduler, config, control
        self.device = unet.device
        unet.train().requires_grad_(False)
        # Drawn on the CPU, so that a seed means the same on every device.
        self.generator = torch.Generator().manual_seed(config.seed)
        self.parameters = unet.trainable_parameters(config.trainable)
        if config.lora_rank:
            self.parameters = add_low_rank(unet, self.parameters, config.lora_rank, self.generator)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        self.dtype = PRECISIONS[config.precision]
        _cast(unet, self.dtype)
        self.optimizer = self._make_optimizer()
        self._allocate()
        self.schedule = get_scheduler(
            config.learning_rate_schedule,
            self.optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=config.steps,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        # With checkpointing, memory matters more than time.
        self.freed_memory = FreedMemory(share=1 / 128 if config.gradient_checkpointing else 1 / 16)
        self.history: list[StepRecord] = []
        self.held_out: list[tuple[int, float]] = []
        self._draws = 0

    def _make_optimizer(self) -> torch.optim.Optimizer:
        config, parameters = self.config, self.parameters.values()
        if config.optimizer == "muon":
            return Muon(parameters, config.learning_rate, config.weight_decay)
        return torch.optim.AdamW(
            parameters,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
            eps=config.adam_epsilon,
            fused=True,
        )

    def _allocate(self) -> None:
        """Allocate the moments before the first step, whose activations would otherwise fragment the memory."""
        for parameter in self.parameters.values():
            if self.config.optimizer != "adamw":
                continue  # It allocates its moments itself.
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def _draw_window(self, num_frames: int, generator: torch.Generator) -> Window | None:
        """Draw the frames of a pass; None: all of them, and nothing is drawn."""
        options = self.config.window
        return None if options is None or options.fits(num_frames) else options.draw(num_frames, generator)

    def draw(self, mean: torch.Tensor, deviation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draw a sample of the posterior, noise of the same shape, and a timestep for each video, `(b,)`."""
        latents = mean + deviation * torch.randn(mean.shape, generator=self.generator).to(mean)
        noise = torch.randn(mean.shape, generator=self.generator).to(mean)
        return latents, noise, self._draw_timesteps(mean.shape[0]).to(mean.device)

    def _draw_timesteps(self, number: int) -> torch.Tensor:
        limit, sampling = self.scheduler.config.num_train_timesteps, self.config.timestep_sampling
        if sampling == "uniform":
            return torch.randint(0, limit, (number,), generator=self.generator)
        if sampling == "stratified":
            # Multiples of the golden ratio, modulo 1, are evenly spread however many there are.
            start = torch.rand((), generator=torch.Generator().manual_seed(self.config.seed), dtype=torch.float64)
            shares = (start + GOLDEN_RATIO * torch.arange(self._draws, self._draws + number)) % 1
            self._draws += number
        elif sampling == "cubic":
            shares = 1 - torch.rand(number, generator=self.generator) ** 3
        else:
            shares = torch.randn(number, generator=self.generator).sigmoid()
        return (shares * limit).long().clamp(max=limit - 1)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        # Each trained weight is cast for one product: a cache of casts would only keep them until the end of the pass.
        return torch.autocast(self.device.type, self.dtype, cache_enabled=False)

    def backward(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        window: Window | None = None,
    ) -> float:
        """Add the gradient of one loss, divided by `accumulation_steps`, and return the loss.

        Raises:
            TavError: the loss is not finite, or has exploded.
        """
        weight = self.config.motion_weight
        frames = without_anchor(latents, window).shape[2]
        anchor = int(torch.randint(0, frames, (), generator=self.generator)) if weight else 0
        with self._autocast(), self._without_holes_in_the_heap():
            inputs = (latents, noise, timesteps, encoder_hidden_states, self.control, weight, anchor, window)
            loss = diffusion_loss(self.unet, self.scheduler, *inputs)
        value = loss.item()
        limit = EXPLODED * max(1.0, self.history[0].loss) if self.history else math.inf
        if not math.isfinite(value) or value > limit:
            raise TavError(
                f"tune: the loss of step {len(self.history) + 1} is {value:.6g}; "
                "lower tune.learning_rate, or set tune.precision to float32"
            )
        self.scaler.scale(loss / self.config.accumulation_steps).backward()
        return value

    @contextmanager
    def _without_holes_in_the_heap(self) -> Iterator[None]:
        """Return freed memory to the system after each large layer of the network, and before its backward pass."""
        if self.device.type != "cpu":
            yield
            return

        def after(_: nn.Module, __: Any, hidden_states: torch.Tensor) -> None:
            if is_large(hidden_states):
                self.freed_memory.give_back()
                if hidden_states.requires_grad:
                    hidden_states.register_hook(before_backward)

        def before_backward(_: torch.Tensor) -> None:
            self.freed_memory.give_back()

        layers = (module for module in self.unet.modules() if isinstance(module, ResnetBlock3D | Transformer3DModel))
        handles = [layer.register_forward_hook(after) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def update(self, loss: float, timestep: float) -> StepRecord:
        """Clip the gradient, update the weights, and advance the learning-rate schedule.

        Raises:
            TavError: the gradient is not finite, in float16 at any scale of the loss.
        """
        for parameter in self.parameters.values():
            # A weight that took no part, as the temporal attention where that is off, decays all the same.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_gradient_norm).item()
        learning_rate = self.schedule.get_last_lr()[0]
        updated = math.isfinite(norm)
        if not updated and not self.scaler.is_enabled():
            raise TavError(f"tune: the gradient of step {len(self.history) + 1} is {norm}; lower tune.learning_rate")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.is_enabled() and self.scaler.get_scale() < 2.0**-14:
            raise TavError("tune: float16 overflows at any scale; set tune.precision to bfloat16 or float32")
        self.optimizer.zero_grad()  # Frees the gradients, which nothing needs until the next backward pass.
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # It warns that the optimizer has not stepped yet, because float16 may skip the first steps.
            self.schedule.step()
        record = StepRecord(len(self.history) + 1, loss, learning_rate, norm, timestep, float(updated))
        self.history.append(record)
        return record

    def step(self, mean: torch.Tensor, deviation: torch.Tensor, encoder_hidden_states: torch.Tensor) -> StepRecord:
        """Update the weights once on a clip, given its posterior (each `b c f h w`) and its caption's embeddings `b n c`."""
        losses, timesteps = [], []
        for _ in range(self.config.accumulation_steps):
            window = self._draw_window(mean.shape[2], self.generator)
            latents, noise, drawn = self.draw(select(mean, window), select(deviation, window))
            losses.append(self.backward(latents, noise, drawn, encoder_hidden_states, window))
            timesteps.append(drawn.float().mean().item())
        return self.update(sum(losses) / len(losses), sum(timesteps) / len(timesteps))

    @torch.no_grad()
    def measure_held_out(self, mean: torch.Tensor, encoder_hidden_states: torch.Tensor) -> float:
        """Return the loss on noise and timesteps that are the same each time, and that no step is trained on.

        The timesteps are evenly spread, which takes most of the variance out of the loss.
        """
        generator = torch.Generator().manual_seed(self.config.seed + 1)
        limit = self.scheduler.config.num_train_timesteps
        losses = []
        self.unet.eval()
        for i in range(HELD_OUT_DRAWS):
            window = self._draw_window(mean.shape[2], generator)
            latents = select(mean, window)
            noise = torch.randn(latents.shape, generator=generator).to(mean)
            timesteps = torch.full((mean.shape[0],), int((i + 0.5) / HELD_OUT_DRAWS * limit), device=mean.device)
            with self._autocast():
                inputs = (latents, noise, timesteps, encoder_hidden_states, self.control)
                losses.append(diffusion_loss(self.unet, self.scheduler, *inputs, window=window).item())
        self.unet.train()
        return sum(losses) / len(losses)

    @property
    def is_flat(self) -> bool:
        """Whether the loss on held-out noise has not improved within the last `early_stopping` steps."""
        if not self.config.early_stopping or not self.held_out:
            return False
        best_step, best = self.held_out[0]
        for step, loss in self.held_out[1:]:
            if loss < best * (1 - IMPROVEMENT):
                best_step, best = step, loss
        return self.held_out[-1][0] - best_step >= self.config.early_stopping

    def check_finite(self) -> None:
        """Check the trained weights and the optimizer's state.

        Raises:
            TavError: a value is NaN or infinite.
        """
        kept = (value for state in self.optimizer.state.values() for value in state.values())
        if not all(torch.isfinite(tensor).all() for tensor in (*self.parameters.values(), *kept)):
            raise TavError(f"tune: the weights of step {len(self.history)} are not finite; lower tune.learning_rate")

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the tuning depends on, as tensors and plain values.

        Tensors are not copied. `tav_model.checkpoints` writes and reads this as a file.
        """
        generators = {"generator": self.generator.get_state(), "cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "parameters": {name: value.detach() for name, value in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "generators": generators,
            "history": [list(record) for record in self.history],
            "held_out": [list(measured) for measured in self.held_out],
            "config": asdict(self.config),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of a tuner with the same model and config, bit-identical to one that never stopped."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.generator.set_state(state["generators"]["generator"])
        torch.set_rng_state(state["generators"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["generators"]:
            torch.cuda.set_rng_state(state["generators"]["cuda"], self.device)
        self.history = [StepRecord(int(step), *rest) for step, *rest in state["history"]]
        self.held_out = [(int(step), float(loss)) for step, loss in state["held_out"]]
        self._draws = len(self.history) * self.config.accumulation_steps

    def fit(
        self,
        mean: torch.Tensor,
        deviation: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        checkpoints: Checkpoints | None = None,
        on_step: Callable[[StepRecord], None] | None = None,
        on_resume: Callable[[Sequence[StepRecord]], None] | None = None,
    ) -> list[StepRecord]:
        """Tune on one clip, resuming from the newest of `checkpoints` if there is one.

        Args:
            mean: of the posterior of the clip's latents, `1 c f h w`.
            deviation: of the posterior, `1 c f h w`.
            encoder_hidden_states: the embeddings of the clip's caption, `1 n c`.
            checkpoints: where to save the state, and how often.
            on_step: called with the record of each step. If it raises an interruption (an exception that is no
                `Exception`), the step is saved before `fit` ends with it.
            on_resume: called once, before the first step, with the records of the steps before an interruption, if any.

        Returns:
            The records of all steps, including those before an interruption. With `early_stopping`, they may be fewer than
            the config's `steps`.

        Raises:
            TavError: the loss, its gradient or a weight is not finite, or the loss has exploded. Earlier checkpoints are
                kept; all their values are finite.
        """
        if checkpoints is not None:
            checkpoints.restore(self)
        if on_resume is not None and self.history:
            on_resume(tuple(self.history))
        while len(self.history) < self.config.steps and not self.is_flat:
            record = self.step(mean, deviation, encoder_hidden_states)
            if self.config.early_stopping and record.step % HELD_OUT_EVERY == 0:
                self.held_out.append((record.step, self.measure_held_out(mean, encoder_hidden_states)))
            interruption: BaseException | None = None
            try:
                if on_step is not None:
                    on_step(record)
            except BaseException as error:
                if isinstance(error, Exception):
                    raise
                interruption = error
            if checkpoints is not None and (interruption or record.step % checkpoints.every == 0):
                self.check_finite()
                checkpoints.save(self, record.step)
            if interruption:
                raise interruption
        self.check_finite()
        self.unet.eval()
        return self.history


def _cast(unet: nn.Module, frozen: torch.dtype) -> None:
    """Cast frozen matrices and kernels to `frozen`, and trained parameters and norms to float32, whatever they were.

    Tensors are cast one by one, so that there are never two copies of the model.
    """
    for module in unet.modules():
        has_matrix = isinstance(module, (nn.Linear, nn.Conv2d))
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(frozen if has_matrix and not parameter.requires_grad else torch.float32)
