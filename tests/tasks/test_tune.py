"""The checkpoint that a stopped tuning resumes from is found without the base model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.tune import BASE_FILE, _identity, resume_step
from tav.config import AttentionParams, TuneParams, WindowParams
from tav_model.digests import digest
from tav_model.files import write_json, write_text
from tav_model.tensors import save_tensors
from tests.support.projects import ROOT

SETTINGS: dict[str, Any] = {
    "base_name": "models/base",
    "attention": AttentionParams(),
    "params": TuneParams(steps=60),
    "seed": 33,
}


def write_checkpoint(folder: Path, step: int, identity: str) -> None:
    state = {"stage": "tune", "state": json.dumps({"identity": identity})}
    save_tensors(folder / f"step-{step:06d}.safetensors", {"weight": torch.zeros(3)}, state)


@pytest.fixture
def stopped(tmp_path: Path) -> tuple[Path, Path]:
    """The latents of a clip, and the checkpoints of its tuning and of another."""
    latents, checkpoints = tmp_path / "latents", tmp_path / "checkpoints"
    write_text(latents / "latents.safetensors", "latents")
    write_json(checkpoints / BASE_FILE, {"base_model": "models/base", "base_digest": "abc"})
    identity = _identity(digest(latents), "abc", SETTINGS["attention"], SETTINGS["params"], SETTINGS["seed"])
    write_checkpoint(checkpoints, 20, identity)
    write_checkpoint(checkpoints, 40, identity)
    write_checkpoint(checkpoints, 50, "of other settings")
    return latents, checkpoints


def test_the_latest_checkpoint_of_these_settings(stopped: tuple[Path, Path]) -> None:
    latents, checkpoints = stopped
    assert resume_step(latents, checkpoints, **SETTINGS) == 40
    (checkpoints / "step-000040.safetensors").write_text("damaged")
    assert resume_step(latents, checkpoints, **SETTINGS) == 20


@pytest.mark.parametrize(
    "other",
    [
        {"base_name": "models/other"},
        {"attention": AttentionParams(temporal=False)},
        {"params": TuneParams(steps=61)},
        {"seed": 34},
    ],
)
def test_no_checkpoint_of_other_settings(stopped: tuple[Path, Path], other: dict[str, Any]) -> None:
    assert resume_step(*stopped, **SETTINGS | other) is None


def test_checkpoints_of_windows_are_their_own(stopped: tuple[Path, Path]) -> None:
    latents, checkpoints = stopped
    window = WindowParams(context_length=4)
    write_checkpoint(checkpoints, 55, "of other settings")
    for frames, step in ((4, 41), (5, None)):  # The clip fits, or is divided.
        save_tensors(latents / "latents.safetensors", {"mean": torch.zeros(1, 4, frames, 2, 2)}, {})
        parts = (digest(latents), "abc", SETTINGS["attention"], SETTINGS["params"], SETTINGS["seed"])
        write_checkpoint(checkpoints, 41, _identity(*parts))
        assert resume_step(latents, checkpoints, **SETTINGS, window=window) == step
        assert resume_step(latents, checkpoints, **SETTINGS) == 41
    write_checkpoint(checkpoints, 42, _identity(*parts, window.options(5)))
    assert resume_step(latents, checkpoints, **SETTINGS, window=window) == 42


def test_no_checkpoint_of_other_latents_or_where_nothing_is(stopped: tuple[Path, Path], tmp_path: Path) -> None:
    latents, checkpoints = stopped
    assert resume_step(tmp_path / "missing", checkpoints, **SETTINGS) is None
    assert resume_step(latents, tmp_path / "missing", **SETTINGS) is None
    (latents / "latents.safetensors").write_text("other")
    assert resume_step(latents, checkpoints, **SETTINGS) is None
    write_text(checkpoints / BASE_FILE, "{}")
    assert resume_step(latents, checkpoints, **SETTINGS) is None


def test_looking_imports_neither_torch_nor_dvc(stopped: tuple[Path, Path]) -> None:
    code = f"""
import sys
from pathlib import Path
from tasks.tune import resume_step
from tav.config import AttentionParams, TuneParams
paths = Path({str(stopped[0])!r}), Path({str(stopped[1])!r})
step = resume_step(*paths, base_name="models/base", attention=AttentionParams(), params=TuneParams(steps=60), seed=33)
print(step, sorted({{"torch", "dvc", "numpy"}} & sys.modules.keys()))
"""
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output == "40 []\n"
