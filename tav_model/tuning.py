"""One-shot tuning: the standard diffusion loss on the latents of a clip (Tune-A-Video, arXiv 2212.11565, section 3.3)."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.optimization import get_scheduler
from torch import nn

from tav_model.errors import TavError
from tav_model.tensors import load_tensors, save_tensors
from tav_model.tuned_weights import TRAINABLE_MODULES

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from tav_model.networks.unet import UNet3DConditionModel

# A loss this many times that of the first step is no learning any more: predicting nothing at all gives about 1.
EXPLODED = 1000
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class TuningConfig:
    """How to tune. The defaults are the paper's settings.

    `precision` is that of the products: trained weights, their gradients and the loss stay in float32, frozen matrices
    and kernels are kept in it. A step is one update of the weights, after `accumulation_steps` backward passes.
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
    seed: int = 33


class StepRecord(NamedTuple):
    """What one step showed. `updated` 0: float16 overflowed, the scale was halved and the weights left alone."""

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
) -> torch.Tensor:
    """`|| target - prediction(sqrt(a_t) x + sqrt(1 - a_t) e, t, text) ||^2`, the mean over all elements, in float32.

    The target is the noise `e` (Ho et al., arXiv 2006.11239) or the velocity `sqrt(a_t) e - sqrt(1 - a_t) x` (Salimans
    and Ho, arXiv 2202.00512), as the scheduler's `prediction_type` says.

    Args:
        latents, noise: `b c f h w`.
        timesteps: `(b,)`.
        encoder_hidden_states: `b n c`.

    Raises:
        TavError: another prediction type.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        target = noise
    elif kind == "v_prediction":
        target = scheduler.get_velocity(latents, noise, timesteps)
    else:
        raise TavError(f"prediction_type: {kind!r} cannot be tuned; allowed: epsilon, v_prediction")
    prediction = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, encoder_hidden_states).sample
    return F.mse_loss(prediction.float(), target.float())


class Tuner:
    """The trained weights of `unet` with their optimizer; `step` is one update, `save` and `resume` are checkpoints.

    In half precision the frozen weights of `unet` are cast in place.
    """

    def __init__(self, unet: UNet3DConditionModel, scheduler: SchedulerMixin, config: TuningConfig) -> None:
        if config.precision not in PRECISIONS:
            raise TavError(f"precision: {config.precision!r} must be one of {', '.join(PRECISIONS)}")
        self.unet, self.scheduler, self.config = unet, scheduler, config
        self.device = unet.device
        unet.train().requires_grad_(False)
        self.parameters = unet.trainable_parameters(config.trainable)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        self.dtype = PRECISIONS[config.precision]
        _cast(unet, self.dtype)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
            eps=config.adam_epsilon,
            fused=True,
        )
        self._make_room()
        self.schedule = get_scheduler(
            config.learning_rate_schedule,
            self.optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=config.steps,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        # Drawn on the CPU, so that a seed means the same on every device.
        self.generator = torch.Generator().manual_seed(config.seed)
        self.history: list[StepRecord] = []

    def _make_room(self) -> None:
        """Gradients and moments before the first step, so that they do not break up the memory of its activations."""
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def draw(self, mean: torch.Tensor, deviation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A sample of the posterior, noise of the same shape, and a timestep for each video, `(b,)`."""
        latents = mean + deviation * torch.randn(mean.shape, generator=self.generator).to(mean)
        noise = torch.randn(mean.shape, generator=self.generator).to(mean)
        limit = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(0, limit, (mean.shape[0],), generator=self.generator).to(mean.device)
        return latents, noise, timesteps

    def backward(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> float:
        """Add the gradient of one loss, divided by `accumulation_steps`; returns the loss."""
        half = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype) if half else nullcontext():
            loss = diffusion_loss(self.unet, self.scheduler, latents, noise, timesteps, encoder_hidden_states)
        value = loss.item()
        limit = EXPLODED * max(1.0, self.history[0].loss) if self.history else math.inf
        if not math.isfinite(value) or value > limit:
            raise TavError(
                f"tune: the loss of step {len(self.history) + 1} is {value:.6g}; "
                "lower tune.learning_rate, or set tune.precision to float32"
            )
        self.scaler.scale(loss / self.config.accumulation_steps).backward()
        return value

    def update(self, loss: float, timestep: float) -> StepRecord:
        """Clip the gradient, update the weights, go on in the learning-rate schedule."""
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
        self.optimizer.zero_grad(set_to_none=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # That the optimizer has not stepped yet: float16 may skip its first steps.
            self.schedule.step()
        record = StepRecord(len(self.history) + 1, loss, learning_rate, norm, timestep, float(updated))
        self.history.append(record)
        return record

    def step(self, mean: torch.Tensor, deviation: torch.Tensor, encoder_hidden_states: torch.Tensor) -> StepRecord:
        """One update on a clip: its posterior (each `b c f h w`) and its caption's embeddings (`b n c`)."""
        losses, timesteps = [], []
        for _ in range(self.config.accumulation_steps):
            latents, noise, drawn = self.draw(mean, deviation)
            losses.append(self.backward(latents, noise, drawn, encoder_hidden_states))
            timesteps.append(drawn.float().mean().item())
        return self.update(sum(losses) / len(losses), sum(timesteps) / len(timesteps))

    def check_finite(self) -> None:
        """Raises TavError where a weight or what the optimizer keeps of it is infinite or no number."""
        kept = (value for state in self.optimizer.state.values() for value in state.values())
        if not all(torch.isfinite(tensor).all() for tensor in (*self.parameters.values(), *kept)):
            raise TavError(f"tune: the weights of step {len(self.history)} are not finite; lower tune.learning_rate")

    # Checkpoints

    def save(self, path: Path, identity: str) -> None:
        """Everything that the rest of the tuning depends on, in one safetensors file, written atomically.

        Args:
            identity: what is being tuned and how; `resume` refuses a checkpoint of another identity.

        Raises:
            TavError: the weights or their moments are not finite; nothing is written.
        """
        self.check_finite()
        tensors = {f"weight.{name}": value.detach() for name, value in self.parameters.items()}
        optimizer = self.optimizer.state_dict()
        for index, state in optimizer["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
        tensors["random.generator"] = self.generator.get_state()
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        tensors["history"] = torch.tensor([list(record) for record in self.history], dtype=torch.float64)
        state = {
            "identity": identity,
            "param_groups": optimizer["param_groups"],
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "config": asdict(self.config),
        }
        save_tensors(path, tensors, {"stage": "tune", "state": json.dumps(state)})

    def resume(self, path: Path, identity: str) -> bool:
        """Go on from a checkpoint, to the same bits as if never stopped. False, changing nothing, if it is another's.

        Raises:
            TavError: the file is damaged.
        """
        tensors, metadata = load_tensors(path)
        state = json.loads(metadata.get("state", "{}"))
        if state.get("identity") != identity:
            return False
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"weight.{name}"])
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                moments.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({"state": moments, "param_groups": state["param_groups"]})
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.generator.set_state(tensors["random.generator"])
        torch.set_rng_state(tensors["random.cpu"])
        if self.device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], self.device)
        self.history = [StepRecord(int(step), *rest) for step, *rest in tensors["history"].tolist()]
        return True


def tune(
    tuner: Tuner,
    mean: torch.Tensor,
    deviation: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    checkpoints: Path | None = None,
    checkpoint_every: int = 100,
    identity: str = "",
    on_step: Callable[[StepRecord], None] | None = None,
    on_resume: Callable[[Sequence[StepRecord]], None] | None = None,
) -> list[StepRecord]:
    """Tune on one clip, from the newest checkpoint in the folder `checkpoints` if there is one of this `identity`.

    Args:
        mean, deviation: the posterior of the clip's latents, `1 c f h w`.
        encoder_hidden_states: its caption, `1 n c`.
        on_step: called with the record of each step.
        on_resume: called once, before the first step, with the records of those before an interruption, if there are any.

    Returns:
        The records of all steps, those before an interruption included.

    Raises:
        TavError: the loss, its gradient or a weight is not finite, or the loss has exploded. The checkpoints from
            before are kept; none has such numbers in it.
    """
    if checkpoints is not None:
        for path in sorted(checkpoints.glob("step-*.safetensors"), reverse=True):
            try:
                if tuner.resume(path, identity):
                    break
            except TavError:
                path.unlink()  # Damaged from outside; the one before it still serves.
    if on_resume is not None and tuner.history:
        on_resume(tuple(tuner.history))
    while len(tuner.history) < tuner.config.steps:
        record = tuner.step(mean, deviation, encoder_hidden_states)
        if on_step is not None:
            on_step(record)
        if checkpoints is not None and record.step % checkpoint_every == 0:
            tuner.save(checkpoints / f"step-{record.step:06d}.safetensors", identity)
            # By age: another tuning may have left later steps behind.
            for old in sorted(checkpoints.glob("step-*.safetensors"), key=lambda path: path.stat().st_mtime_ns)[:-2]:
                old.unlink()
    tuner.check_finite()
    tuner.unet.eval()
    return tuner.history


def _cast(unet: nn.Module, frozen: torch.dtype) -> None:
    """Keep frozen matrices and kernels in the precision `frozen`; what is trained, and the norms, in float32.

    Tensor by tensor, so that there are never two copies of the whole, also of a base that was loaded in half precision.
    """
    for module in unet.modules():
        kernel = isinstance(module, (nn.Linear, nn.Conv2d))
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(frozen if kernel and not parameter.requires_grad else torch.float32)
