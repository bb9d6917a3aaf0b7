"""The checkpoint that a stopped tuning resumes from is found without the base model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.edit import edit
from tasks.invert import invert
from tasks.rows import RowBatch
from tasks.tune import BASE_FILE, _identity, resume_step, tune
from tav.config import AttentionParams, EditParams, InvertParams, TuneParams, WindowParams
from tav.config.prompts import PromptRow
from tav.runtime.events import EventStream
from tav.runtime.progress import Progress
from tav_model import tuning
from tav_model.digests import digest
from tav_model.files import read_json, write_json, write_text
from tav_model.tensors import read_shapes, save_tensors
from tests.support.models import CONTEXT_DIM, noise, small_base
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


def test_an_automatic_precision_is_that_of_the_tuning(stopped: tuple[Path, Path]) -> None:
    latents, checkpoints = stopped
    automatic = SETTINGS | {"params": TuneParams(steps=60, precision="auto")}
    assert resume_step(latents, checkpoints, **automatic) is None
    record = {"base_model": "models/base", "base_digest": "abc"}
    for resolved, step in (("float32", 40), ("bfloat16", None)):
        write_json(checkpoints / BASE_FILE, record | {"precisions": {"auto": resolved}})
        assert resume_step(latents, checkpoints, **automatic) == step
        assert resume_step(latents, checkpoints, **SETTINGS) == 40
    write_json(checkpoints / BASE_FILE, record | {"precisions": "float32"})
    assert resume_step(latents, checkpoints, **automatic) is None  # damaged


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
    write_checkpoint(checkpoints, 42, _identity(*parts, windows=window.options(5)))
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


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, {"weight", "bias"}),
        ({"lora_rank": 2}, {"lora_down", "lora_up"}),
        ({"optimizer": "muon", "timestep_sampling": "stratified", "early_stopping": 1}, {"weight", "bias"}),
    ],
    ids=["weights", "low-rank updates", "muon"],
)
def test_what_is_tuned_is_inverted_and_edited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], names: set[str]
) -> None:
    monkeypatch.setattr(tuning, "HELD_OUT_EVERY", 1)
    base, latents = str(small_base(tmp_path / "base")), tmp_path / "latents"
    posterior = {"mean": noise(1, 4, 2, 8, 8), "deviation": 0.1 * noise(1, 4, 2, 8, 8, seed=1).abs()}
    save_tensors(latents / "latents.safetensors", posterior, {"scale": "1", "fps": "8"})
    text = {"caption": noise(1, 77, CONTEXT_DIM), "empty": noise(1, 77, CONTEXT_DIM, seed=1)}
    save_tensors(latents / "text.safetensors", text, {})
    shared: dict[str, Any] = {"base": base, "attention": AttentionParams(), "device": "cpu"}
    tune(
        latents,
        tmp_path / "tuned",
        base_name="base",
        params=TuneParams(steps=2, learning_rate=1e-2, **settings),
        seed=1,
        gradient_checkpointing=False,
        checkpoints=tmp_path / "checkpoints",
        checkpoint_every=10,
        progress=Progress(EventStream(), stage="tune", total=2),
        **shared,
    )
    shapes, _ = read_shapes(tmp_path / "tuned/tuned.safetensors")
    assert {name.rpartition(".")[2] for name in shapes} == names
    info = read_json(tmp_path / "tuned/tuned.json")
    assert info["steps"] == 2
    assert [step for step, _ in info.get("held_out_loss", [])] == ([1, 2] if "early_stopping" in settings else [])
    progress = Progress(EventStream(), stage="invert", total=2)
    folders = (latents, tmp_path / "tuned", tmp_path / "inverted")
    invert(*folders, params=InvertParams(steps=2), progress=progress, **shared)
    rows = [PromptRow(line=2, prompt="a red ball", name="red")]
    batch = RowBatch(
        rows,
        tmp_path / "inverted",
        tmp_path / "tuned",
        tmp_path / "edits",
        root=tmp_path,
        params=EditParams(steps=2),
        seed=1,
        store=tmp_path / "store",
        **shared,
    )
    edit(batch, EventStream())
    assert (tmp_path / "edits/red.mp4").exists()
