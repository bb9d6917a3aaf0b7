"""The training loop of all parts: resumable, extensible, with averaged weights, a decaying learning rate, and MLflow."""

from __future__ import annotations

import contextlib
import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from tav_model.errors import TavError
from tav_model.export import export_network, load_exported
from tav_model.muon import Muon
from tav_model.tensors import load_tensors, read_metadata, save_tensors
from toyworld.training.cuda_graph import CapturedGradients

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

WARM_UP = 100  # Steps.
# The learning rate stays at its peak, and over the last share of the steps decays linearly to this share of the peak. A
# longer training resumes from the end of the plateau (Hägele et al., arXiv 2405.18392).
DECAY = 0.25
LAST_RATE = 0.01
LOG_STEPS = 20


@dataclass(frozen=True)
class Settings:
    """The settings of a training; equal settings result in equal weights on the same machine.

    Attributes:
        steps: optimizer steps in total; may be raised later to train for longer.
        batch: samples per step.
        learning_rate: peak learning rate; see `Muon` for its meaning.
        averaging: decay per step of the moving average of the weights; the average follows faster at first.
        weight_decay: decoupled weight decay.
        seed: seed of weights, samples and noise.
    """

    steps: int
    batch: int
    learning_rate: float
    averaging: float = 0.999
    weight_decay: float = 0.0
    seed: int = 0

    @property
    def plateau(self) -> int:
        """Number of steps before the learning rate decays."""
        return self.plateau_of(self.steps)

    @staticmethod
    def plateau_of(steps: int) -> int:
        """Return the number of steps before the learning rate decays, of so many steps in total."""
        return steps - int(DECAY * steps)

    def identity(self) -> str:
        """Return what checkpoints of the same training have in common: everything but the number of steps."""
        return str({name: value for name, value in asdict(self).items() if name != "steps"})


class Part(ABC, Dataset[dict[str, torch.Tensor]]):
    """A part of the base model: its networks, its samples and its loss. Item i of the dataset is the batch of step i.

    Args:
        settings: of the training.

    Attributes:
        name: names the checkpoint and the MLflow run.
        networks: the networks to train.
    """

    name: str
    networks: torch.nn.ModuleDict

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def __len__(self) -> int:
        return self.settings.steps

    @abstractmethod
    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        """Return the batch of a step, which depends only on the settings and the step."""

    def prepared(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return what `loss` needs of a batch that is on the device: by default, the batch as it is."""
        return batch

    @abstractmethod
    def loss(self, batch: dict[str, torch.Tensor], generator: torch.Generator) -> torch.Tensor:
        """Return the loss of a batch that is on the device.

        On a GPU, a CUDA graph of it is replayed, so what it computes must not depend on the values of tensors.

        Args:
            batch: what `prepared` returns.
            generator: generator of the step's noise, on the device.
        """

    @abstractmethod
    def evaluate(self) -> tuple[dict[str, float], np.ndarray | None]:
        """Return metrics on samples that are held out from training, and a picture to inspect, `h w c` in uint8."""

    @abstractmethod
    def exported(self) -> dict[str, torch.nn.Module]:
        """Return the trained networks by their folders in the base model."""

    def export(self, base: Path) -> None:
        """Write the networks in float16 to their folders in the base model."""
        for place, network in self.exported().items():
            export_network(network, base / place)

    def start_from(self, base: Path) -> None:
        """Start from the weights of a base model instead of random ones; its checkpoints have names of their own.

        Raises:
            TavError: the base model lacks a network, or has one of another shape.
        """
        for place, network in self.exported().items():
            load_exported(network, base / place)
        self.name += "-continued"

    def embeddings(self) -> list[torch.Tensor]:
        """Return the embedding tables, which the optimizer must not treat as matrices."""
        return [m.weight for m in self.networks.modules() if isinstance(m, torch.nn.Embedding)]


class Training:
    """The training of one part, which resumes from its checkpoint.

    There is a second checkpoint at the end of the plateau, from which a training with more steps resumes.

    Args:
        part: the part to train.
        folder: folder of the checkpoint.
        device: "cpu", "cuda", ...
        evaluate_every: steps between two evaluations.
        save_every: steps between two checkpoints.
        workers: processes that draw samples; 0: this process draws them.
        tracking_uri: MLflow tracking URI; None: no tracking.
        graph: whether one GPU replays a CUDA graph of the gradients.
    """

    def __init__(
        self,
        part: Part,
        folder: Path,
        device: str = "cpu",
        evaluate_every: int = 500,
        save_every: int = 500,
        workers: int = 0,
        tracking_uri: str | None = None,
        graph: bool = True,
    ) -> None:
        self.part, self.device, self.workers = part, device, workers
        self.evaluate_every, self.save_every, self.tracking_uri = evaluate_every, save_every, tracking_uri
        self.checkpoint = folder / f"{part.name}.safetensors"
        self.plateau_checkpoint = folder / f"{part.name}-plateau.safetensors"
        self.settings = part.settings
        part.networks.to(device).train()
        self.trained = {name: p for name, p in part.networks.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.trained.items()}
        self.optimizer = Muon(
            self.trained.values(), self.settings.learning_rate, self.settings.weight_decay, part.embeddings()
        )
        self.step, self.run_id = 0, ""
        # The processes of torchrun draw the same batch, and each computes the gradients of its share.
        shared = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if shared else 0
        self.processes = torch.distributed.get_world_size() if shared else 1
        if self.rank > 0:
            self.tracking_uri = None
        self.generator = torch.Generator(device)
        self.gradients: Callable[[dict[str, torch.Tensor]], torch.Tensor] = self._gradients
        if graph and self.processes == 1 and torch.device(device).type == "cuda":
            self.gradients = CapturedGradients(self._gradients, self.generator)

    def wait(self) -> None:
        """Wait for the other processes, if there are any."""
        if self.processes > 1:
            torch.distributed.barrier()

    def run(self) -> None:
        """Train from the checkpoint, or from the start, to the last step.

        Raises:
            TavError: the checkpoint does not fit, or the loss is NaN or infinity.
        """
        self.resume()
        loader = DataLoader(
            self.part,
            sampler=range(self.step, self.settings.steps),
            batch_size=None,
            num_workers=self.workers,
            persistent_workers=False,
        )
        with self._tracked() as run, _bar(self.part.name, self.step, self.settings.steps, self.rank > 0) as bar:
            for batch in loader:
                share = slice(self.rank, None, self.processes)
                loss = self._step({name: tensor[share].to(self.device) for name, tensor in batch.items()})
                self.step += 1
                bar.update()
                if self.step % LOG_STEPS == 0:
                    if not torch.isfinite(loss):
                        raise TavError(f"{self.part.name}: the loss is {loss.item()} at step {self.step}")
                    bar.set_postfix(loss=f"{loss.item():.4g}", refresh=False)
                    run.log({"loss": loss.item(), "learning_rate": self._learning_rate()}, self.step)
                if self.rank > 0:
                    continue
                last = self.step == self.settings.steps
                if last or self.step % self.save_every == 0:
                    self.save(self.checkpoint)
                if self.step == self.settings.plateau:
                    self.save(self.plateau_checkpoint)
                if last or self.step % self.evaluate_every == 0:
                    self._evaluate(run)

    def _step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        seed = self.settings.seed * 1_000_003 + self.step + 1_000_000_007 * self.rank
        self.generator.manual_seed(seed)
        loss = self.gradients(self.part.prepared(batch))
        self._average_gradients()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        # The window of the average grows with the training, so that early weights are soon forgotten.
        keep = min(self.settings.averaging, 1 - 8 / (self.step + 9))
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.trained.values()], 1 - keep)
        return loss

    def _gradients(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.optimizer.zero_grad()
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            loss = self.part.loss(batch, self.generator)
        loss.backward()
        return loss.detach()

    def _average_gradients(self) -> None:
        if self.processes == 1:
            return
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient) / self.processes)

    def _learning_rate(self) -> float:
        done = (self.step - self.settings.plateau) / max(1, self.settings.steps - self.settings.plateau)
        fall = 1 - (1 - LAST_RATE) * max(0.0, done)
        return self.settings.learning_rate * min(1.0, (self.step + 1) / WARM_UP) * fall

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the networks the averaged weights, in evaluation mode and without gradients, within this context."""
        kept = {name: p.detach().clone() for name, p in self.trained.items()}
        self._load_parameters(self.average)
        self.part.networks.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._load_parameters(kept)
            self.part.networks.train()

    @torch.no_grad()
    def _load_parameters(self, values: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(values[name])

    def _evaluate(self, run: _Run) -> None:
        with self.averaged():
            metrics, picture = self.part.evaluate()
        logger.info("%s step %d: %s", self.part.name, self.step, ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
        run.log(metrics, self.step)
        if picture is not None:
            run.picture(picture, f"{self.part.name}-{self.step:06d}.png")

    def save(self, path: Path) -> None:
        """Write a checkpoint: weights, averaged weights, and the state of the optimizer."""
        tensors = {f"weights.{name}": p.detach() for name, p in self.trained.items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        for name, parameter in self.trained.items():
            tensors |= {f"state.{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        metadata = {
            "part": self.part.name,
            "step": str(self.step),
            "steps": str(self.settings.steps),
            "settings": self.settings.identity(),
            "run": self.run_id,
        }
        save_tensors(path, tensors, metadata)

    def resume(self, path: Path | None = None) -> None:
        """Load a checkpoint.

        Args:
            path: the checkpoint; None: the latest one that this training can continue, if there is one.

        Raises:
            TavError: it is damaged, has other settings or networks, or is of a longer training.
        """
        path = path or self._latest()
        if path is None:
            return
        tensors, metadata = load_tensors(path, self.device)
        if metadata.get("settings") != self.settings.identity():
            raise TavError(
                f"{path}: was made with {metadata.get('settings')}, not {self.settings.identity()}; "
                "use the same settings, or remove it to start again"
            )
        if {name.split(".", 1)[1] for name in tensors if name.startswith("weights.")} != set(self.trained):
            raise TavError(f"{path}: has other networks; remove it to start again")
        self._load_parameters({name: tensors[f"weights.{name}"] for name in self.trained})
        self.average = {name: tensors[f"average.{name}"] for name in self.trained}
        for name, parameter in self.trained.items():
            prefix = f"state.{name}."
            self.optimizer.state[parameter] = {
                # Numbers stay on the CPU, which need not wait for the GPU to read them.
                key.removeprefix(prefix): value if value.ndim else value.cpu()
                for key, value in tensors.items()
                if key.startswith(prefix)
            }
        self.step, self.run_id = int(metadata["step"]), metadata["run"]
        logger.info("%s: resumes from step %d", self.part.name, self.step)

    def _latest(self) -> Path | None:
        """Return the latest checkpoint whose learning rate is that of this training."""
        for path in (self.checkpoint, self.plateau_checkpoint):
            if not path.exists():
                continue
            metadata = read_metadata(path)
            step, steps = (int(metadata.get(key, 0)) for key in ("step", "steps"))
            if steps == self.settings.steps or step <= min(Settings.plateau_of(steps), self.settings.plateau):
                return path
        if self.checkpoint.exists():
            raise TavError(
                f"{self.checkpoint}: has {step} of {steps} steps, and its learning rate has decayed further than that "
                f"of {self.settings.steps} steps; train for more steps, or remove it to start again"
            )
        return None

    @contextlib.contextmanager
    def _tracked(self) -> Iterator[_Run]:
        if self.tracking_uri is None:
            yield _Run(None)
            return
        import mlflow

        mlflow.set_tracking_uri(self.tracking_uri)
        mlflow.set_experiment("toyworld")
        with mlflow.start_run(self.run_id or None, run_name=self.part.name) as active:
            if not self.run_id:
                mlflow.log_params({"part": self.part.name, **asdict(self.settings)})
            self.run_id = active.info.run_id
            yield _Run(mlflow)


class _Run:
    """An active MLflow run; without MLflow, a run that logs nothing.

    Args:
        mlflow: the module, or None.
    """

    def __init__(self, mlflow: Any | None) -> None:
        self.mlflow = mlflow

    def log(self, values: dict[str, Any], step: int) -> None:
        if self.mlflow:
            self.mlflow.log_metrics(values, step)

    def picture(self, picture: np.ndarray, name: str) -> None:
        if self.mlflow:
            self.mlflow.log_image(picture, f"samples/{name}")


def _bar(name: str, done: int, total: int, hidden: bool) -> tqdm:
    # Outside a terminal, one line per minute is enough.
    interval = 0.5 if sys.stderr.isatty() else 60
    return tqdm(
        desc=name,
        initial=done,
        total=total,
        unit="step",
        mininterval=interval,
        maxinterval=2 * interval,
        disable=hidden,
    )
