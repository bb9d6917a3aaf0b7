"""The control of a stage in rows: their identity, their own scale, and what the pipeline receives."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks.edit import edit
from tasks.rows import RowBatch, render_rows
from tasks.stage_control import StageControl, network_digest
from tav.config import EditParams
from tav.config.prompts import PromptRow
from tav.reports.videos import read_edit
from tav.runtime.events import EventStream
from tav_model.digests import digest
from tav_model.files import read_json, write_json
from tav_model.tensors import save_tensors
from tests.support.models import controlnet, noise, pipeline
from tests.support.row_batches import row_batch

STEPS, SHAPE = 2, (1, 4, 3, 8, 8)
CONDITION = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    inverted = {"latents": noise(*SHAPE)}
    save_tensors(tmp_path / "inverted/inverted.safetensors", inverted, {"fps": "8", "steps": str(STEPS)})
    write_json(tmp_path / "tuned/tuned.json", {"sha256": "0"})
    (tmp_path / "base/unet").mkdir(parents=True)
    (tmp_path / "base/unet/config.json").write_text("{}")
    controlnet().save_pretrained(tmp_path / "models/canny")
    annotate(tmp_path, 1.0)
    return tmp_path


def annotate(project: Path, *scales: float) -> None:
    """What the stage `annotate` leaves, with a network for each scale."""
    save_tensors(project / "control/0-canny.safetensors", {"frames": torch.from_numpy(CONDITION)}, {})
    entry = {
        "kind": "canny",
        "model": "models/canny",
        "model_digest": network_digest(str(project / "models/canny")),
        "start": 0.0,
        "end": 1.0,
        "guess_mode": False,
        "condition": "0-canny.safetensors",
        "condition_digest": digest(project / "control/0-canny.safetensors"),
    }
    write_json(project / "control/edit.json", [entry | {"scale": scale} for scale in scales])


def batch_of(project: Path, *rows: PromptRow, controlled: bool = True) -> RowBatch:
    control = StageControl.read(project, project / "control", "edit") if controlled else None
    networks = control.networks("cpu", torch.float32) if control else None
    params = EditParams(steps=STEPS, guidance_scale=2.0)
    return row_batch(project, rows, params, pipeline(controlnet=networks), control=control)


def row(prompt: str = "a dog", scale: float | None = None, name: str = "dog") -> PromptRow:
    return PromptRow(line=2, prompt=prompt, name=name, control_scale=scale)


def identity(project: Path, scale: float | None = None, **options: bool) -> str:
    return batch_of(project, row(scale=scale), **options).rows[0].identity


def test_identity_depends_on_the_control_and_on_nothing_more(project: Path) -> None:
    first = identity(project)
    assert identity(project) == first
    assert identity(project, 1.0) == first  # The scale that the parameters set.
    assert len({first, identity(project, 0.5), identity(project, controlled=False)}) == 3
    annotate(project, 0.5)
    assert identity(project, 1.0) == first and identity(project) != first
    shutil.rmtree(project / "control")
    assert identity(project) == identity(project, controlled=False)


def test_rows_are_rendered_under_control_at_their_own_scale(project: Path) -> None:
    rows = (row(), row(scale=0.0, name="none"), row(scale=0.25, name="weak"))
    batch = batch_of(project, *rows)
    batch.batch_size = 3
    assert batch.first_group(batch.rows) == batch.rows[:1]
    edit(batch, EventStream())
    records = {one.name: read_json(project / f"edits/{one.name}.json") for one in rows}
    assert {name: record["control"] for name, record in records.items()} == {
        "dog": "canny 1",
        "none": "canny 0",
        "weak": "canny 0.25",
    }
    assert "control_scale" not in records["dog"] and records["weak"]["control_scale"] == 0.25
    assert read_edit(project / "edits/weak.mp4", "weak", "a man").settings["control"] == "canny 0.25"
    plain = batch_of(project, row(name="plain"), controlled=False)
    plain.out = project / "plain"
    edit(plain, EventStream())
    videos = {name: (project / f"edits/{name}.mp4").read_bytes() for name in records}
    assert videos["none"] == (project / "plain/plain.mp4").read_bytes()
    assert len(set(videos.values())) == 3
    assert "control" not in read_json(project / "plain/plain.json")


def test_the_pipeline_receives_what_annotate_has_written(project: Path) -> None:
    annotate(project, 0.5, 0.75)
    batch = batch_of(project, row())
    arguments = batch._pipeline_arguments(batch.rows[0])
    assert [np.array_equal(one, CONDITION) for one in arguments["conditioning_frames"]] == [True, True]
    assert arguments["controlnet_conditioning_scale"] == [0.5, 0.75]
    assert arguments["control_guidance_end"] == [1.0, 1.0] and arguments["guess_mode"] is False


def test_a_scale_without_control_fails_alone(project: Path) -> None:
    batch = batch_of(project, row(), row(scale=0.5, name="weak"), controlled=False)
    results = {one.row.name: one.error for one in render_rows(batch, batch.rows, EventStream())}
    assert results == {"dog": None, "weak": "control_scale: the clip has no control; set it in params.yaml"}
