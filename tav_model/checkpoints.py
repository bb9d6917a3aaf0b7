"""Checkpoints of a tuning as safetensors files, and a folder of them from which the tuning resumes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from tav_model.errors import TavError
from tav_model.tensors import load_tensors, save_tensors

KEPT = 2  # the newest ones: if the last is damaged, the one before it serves


class Stateful(Protocol):
    """What can be saved and restored: `tav_model.tuning.Tuner`."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the tuning depends on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""


@dataclass(frozen=True)
class Checkpoints:
    """A folder of checkpoints.

    Attributes:
        folder: where they are.
        identity: what is tuned and how; checkpoints of another identity are ignored.
        every: steps between two checkpoints.
    """

    folder: Path
    identity: str = ""
    every: int = 100

    def save(self, tuner: Stateful, step: int) -> None:
        """Write a checkpoint atomically, and remove all but the two newest."""
        save_checkpoint(self.folder / f"step-{step:06d}.safetensors", tuner.state_dict(), self.identity)
        # By age, because another tuning may have left checkpoints of later steps.
        for old in sorted(self._paths(), key=lambda path: path.stat().st_mtime_ns)[:-KEPT]:
            old.unlink()

    def restore(self, tuner: Stateful) -> bool:
        """Load the checkpoint of the latest step of this identity. Damaged ones are removed.

        Returns:
            Whether there was one.
        """
        for path in sorted(self._paths(), reverse=True):
            try:
                state = load_checkpoint(path, self.identity)
            except TavError:
                path.unlink()  # Damaged from outside. The one before it is still good.
                continue
            if state is not None:
                tuner.load_state_dict(state)
                return True
        return False

    def _paths(self) -> list[Path]:
        return list(self.folder.glob("step-*.safetensors"))


def save_checkpoint(path: Path, state: dict[str, Any], identity: str) -> None:
    """Write the state of a `Tuner` atomically: tensors as they are, the rest as JSON in the file's metadata."""
    tensors = {f"weight.{name}": value for name, value in state["parameters"].items()}
    for index, moments in state["optimizer"]["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in moments.items()}
    tensors |= {f"random.{name}": value for name, value in state["generators"].items()}
    tensors["history"] = torch.tensor(state["history"], dtype=torch.float64)
    rest = {
        "identity": identity,
        "param_groups": state["optimizer"]["param_groups"],
        "schedule": state["schedule"],
        "scaler": state["scaler"],
        "held_out": state["held_out"],
        "config": state["config"],
    }
    save_tensors(path, tensors, {"stage": "tune", "state": json.dumps(rest)})


def load_checkpoint(path: Path, identity: str) -> dict[str, Any] | None:
    """Return the state in a checkpoint, or None if it is of another identity.

    Raises:
        TavError: the file is damaged.
    """
    tensors, metadata = load_tensors(path)
    rest = json.loads(metadata.get("state", "{}"))
    if rest.get("identity") != identity:
        return None
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        group, _, key = name.partition(".")
        groups.setdefault(group, {})[key] = tensor
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in groups["optimizer"].items():
        index, key = name.split(".")
        moments.setdefault(int(index), {})[key] = tensor
    return {
        "parameters": groups["weight"],
        "optimizer": {"state": moments, "param_groups": rest["param_groups"]},
        "schedule": rest["schedule"],
        "scaler": rest["scaler"],
        "generators": groups["random"],
        "history": tensors["history"].tolist(),
        "held_out": rest.get("held_out", []),
        "config": rest["config"],
    }
