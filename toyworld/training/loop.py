"""The loop that trains each part: resumable, with averaged weights, a learning rate that decays, and MLflow."""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from tav_model.errors import TavError
from tav_model.tensors import load_tensors, save_tensors

from .muon import Muon

if TYPE_CHECKING:
    import mlflow
    import numpy as np

logger = logging.getLogger(__name__)

WARM_UP = 100
# The learning rate stays at its height for this share of the steps, then falls in a line to a hundredth.
PLATEAU = 0.5
LAST_RATE = 0.01
LOG_STEPS = 20


@dataclass(frozen=True)
class Settings:
    """What a training is: the same settings give the same weights on the same machine.

    Attributes:
        steps: optimizer steps in all.
        batch: samples a step.
        learning_rate: at its height; see `Muon` for its meaning.
        averaging: of the weights, per step, towards the end; the average follows more quickly at first.
        seed: of weights, samples and noise.
    """

    steps: int
    batch: int
    learning_rate: float
    averaging: float = 0.999
    weight_decay: float = 0.0
    seed: int = 0


class Part(ABC, Dataset):
    """Something to train: its networks, its samples and its loss. Item i of the dataset is the batch of step i."""

    name: str
    networks: torch.nn.ModuleDict

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def __len__(self) -> int:
        return self.settings.steps

    @abstractmethod
    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        """The batch of a step; it depends on the settings and the step alone."""

    @abstractmethod
    def loss(self, batch: dict[str, torch.Tensor], generator: torch.Generator) -> torch.Tensor:
        """The loss of a batch that lies on the device. ``generator``: of any noise, on the CPU, one for each step."""

    @abstractmethod
    def evaluate(self) -> tuple[dict[str, float], np.ndarray | None]:
        """Metrics on samples that the training does not see, and a picture to look at, `h w c` uint8."""

    @abstractmethod
    def export(self, base: Path) -> None:
        """Write the networks, float16, to their folders of the base model."""

    def embeddings(self) -> list[torch.nn.Parameter]:
        """Tables of vectors, which the optimizer must not take for matrices."""
        return [m.weight for m in self.networks.modules() if isinstance(m, torch.nn.Embedding)]


class Training:
    """One part's training in a folder, which holds its checkpoint; it goes on from there.

    Args:
        part: what is trained.
        folder: of the checkpoint.
        device: "cpu", "cuda", ...
        evaluate_every: steps between two evaluations.
        save_every: steps between two checkpoints.
        workers: processes that draw the samples; 0: none but this one.
        tracking_uri: of MLflow; None: no logging to it.
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
    ) -> None:
        self.part, self.device, self.workers = part, device, workers
        self.evaluate_every, self.save_every, self.tracking_uri = evaluate_every, save_every, tracking_uri
        self.checkpoint = folder / f"{part.name}.safetensors"
        self.settings = part.settings
        part.networks.to(device).train()
        self.trained = {name: p for name, p in part.networks.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.trained.items()}
        self.optimizer = Muon(
            self.trained.values(), self.settings.learning_rate, self.settings.weight_decay, part.embeddings()
        )
        self.step, self.run_id = 0, ""

    def run(self) -> None:
        """Train from the checkpoint, or from the start, to the last step."""
        self.resume()
        loader = DataLoader(
            self.part,
            sampler=range(self.step, self.settings.steps),
            batch_size=None,
            num_workers=self.workers,
            persistent_workers=False,
        )
        with self._tracked() as run, _bar(self.part.name, self.step, self.settings.steps) as bar:
            for batch in loader:
                loss = self._step({name: tensor.to(self.device) for name, tensor in batch.items()})
                self.step += 1
                bar.update()
                if self.step % LOG_STEPS == 0:
                    if not torch.isfinite(loss):
                        raise TavError(f"{self.part.name}: the loss is {loss.item()} at step {self.step}")
                    bar.set_postfix(loss=f"{loss.item():.4g}", refresh=False)
                    run.log({"loss": loss.item(), "learning_rate": self._learning_rate()}, self.step)
                last = self.step == self.settings.steps
                if last or self.step % self.save_every == 0:
                    self.save()
                if last or self.step % self.evaluate_every == 0:
                    self._evaluate(run)

    def _step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.step)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            loss = self.part.loss(batch, generator)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        # The average is over a window that grows with the training, so that its start does not linger.
        keep = min(self.settings.averaging, 1 - 8 / (self.step + 9))
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.trained.values()], 1 - keep)
        return loss.detach()

    def _learning_rate(self) -> float:
        done = self.step / self.settings.steps
        fall = 1 - (1 - LAST_RATE) * max(0.0, (done - PLATEAU) / (1 - PLATEAU))
        return self.settings.learning_rate * min(1.0, (self.step + 1) / WARM_UP) * fall

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the networks hold the averaged weights and are in eval mode."""
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

    def save(self) -> None:
        """Write the checkpoint: weights, their average, the optimizer's state."""
        tensors = {f"weights.{name}": p.detach() for name, p in self.trained.items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        for name, parameter in self.trained.items():
            tensors |= {f"state.{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        metadata = {"part": self.part.name, "step": str(self.step), "settings": str(asdict(self.settings))}
        save_tensors(self.checkpoint, tensors, metadata | {"run": self.run_id})

    def resume(self) -> None:
        """Take up the checkpoint, if there is one.

        Raises:
            TavError: it is damaged, or of other settings.
        """
        if not self.checkpoint.exists():
            return
        tensors, metadata = load_tensors(self.checkpoint, self.device)
        if metadata.get("settings") != str(asdict(self.settings)):
            raise TavError(
                f"{self.checkpoint}: was made with {metadata.get('settings')}, not {asdict(self.settings)}; "
                "give the same, or remove it to start anew"
            )
        if {name.split(".", 1)[1] for name in tensors if name.startswith("weights.")} != set(self.trained):
            raise TavError(f"{self.checkpoint}: of other networks than these; remove it to start anew")
        self._load_parameters({name: tensors[f"weights.{name}"] for name in self.trained})
        self.average = {name: tensors[f"average.{name}"] for name in self.trained}
        for name, parameter in self.trained.items():
            prefix = f"state.{name}."
            self.optimizer.state[parameter] = {
                key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
            }
        self.step, self.run_id = int(metadata["step"]), metadata["run"]
        logger.info("%s: goes on from step %d", self.part.name, self.step)

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
    """An MLflow run, or none."""

    def __init__(self, client: mlflow | None) -> None:
        self.client = client

    def log(self, values: dict[str, Any], step: int) -> None:
        if self.client:
            self.client.log_metrics(values, step)

    def picture(self, picture: np.ndarray, name: str) -> None:
        if self.client:
            self.client.log_image(picture, f"samples/{name}")


def _bar(name: str, done: int, total: int) -> tqdm:
    # Not on a terminal, a line a minute is enough.
    import sys

    interval = 0.5 if sys.stderr.isatty() else 60
    return tqdm(desc=name, initial=done, total=total, unit="step", mininterval=interval, maxinterval=2 * interval)
