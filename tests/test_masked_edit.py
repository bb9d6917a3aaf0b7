"""Masked edits of a real clip with a model of Stable Diffusion's kind: both entry points, and a kill in between."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tav.config import no_own_settings
from tav.config.prompts import EditRow
from tav_model.blending import feathered
from tav_model.tensors import load_tensors
from tests.support.killing import CLIP, SETTINGS, check_entry_points_and_a_kill, video_is_being_written
from tests.support.models import small_base
from tests.support.projects import change_params, fresh_clone

FEATHER = 4


def car_project(folder: Path) -> Path:
    """A project with a real clip, one prompt with a mask of its right half, and one without a mask."""
    clips = os.environ.get("TAV_TEST_CLIPS")
    if not clips:
        pytest.skip("TAV_TEST_CLIPS does not name the folder of the real clips")
    project = fresh_clone(folder)
    small_base(project / "models/tiny")
    shutil.copy(Path(clips) / "car-turn.mp4", project / "data/car-turn.mp4")
    Image.fromarray(right_half().astype(np.uint8) * 255).save(project / "data/right.png")
    prompts = ["prompt,name,mask", "a red car is turning,red,data/right.png", "a car on the moon,moon,"]
    (project / "data/car-turn.csv").write_text("\n".join([*prompts, ""]))
    caption = "a jeep car is moving on the road"
    clip = {"video": "data/car-turn.mp4", "caption": caption, "prompts": "data/car-turn.csv", **no_own_settings()}
    change_params(project, SETTINGS | {"edit": {"steps": 3, "mask_feather": FEATHER}}, {CLIP: clip})
    return project


def right_half() -> np.ndarray:
    """The mask, 64 64."""
    return np.broadcast_to(np.arange(64) >= 32, (64, 64))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_masked_edit_by_both_entry_points_and_after_a_kill(tmp_path: Path) -> None:
    project = check_entry_points_and_a_kill(car_project(tmp_path / "template"), tmp_path, video_is_being_written)
    edits = project / "results" / CLIP / "edits"
    record = json.loads((edits / "red.json").read_text())
    assert (record["mask"], record["mask_feather"]) == ("data/right.png", FEATHER)
    assert json.loads((edits / "moon.json").read_text())["mask"] is None


@pytest.mark.slow
def test_frames_outside_of_the_feather_are_the_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the stage hands to the encoder of videos is exactly the clip, beyond the feather."""
    from tasks.clip_stages import ClipStages
    from tasks.rows import RowBatch

    project = car_project(tmp_path / "project")
    written, store = {}, RowBatch._store

    def keep(batch: RowBatch, row: EditRow, parts: Iterator[np.ndarray], *others: Any) -> None:
        received = list(parts)
        written[row.name] = np.concatenate(received)
        store(batch, row, iter(received), *others)

    monkeypatch.setattr(RowBatch, "_store", keep)
    monkeypatch.chdir(project)
    for stage in ("decode", "encode", "tune", "invert", "edit"):
        ClipStages(project, CLIP).run(stage)
    frames = load_tensors(project / "results" / CLIP / "frames" / "frames.safetensors")[0]["frames"].numpy()
    (masked,) = [one for one in written.values() if (one[:, :, 0] == frames[:, :, 0]).all()]
    outside = feathered(np.broadcast_to(right_half(), frames.shape[:3]), FEATHER) == 0
    assert outside.any() and (masked[outside] == frames[outside]).all()
    assert (masked[~outside] != frames[~outside]).any()
