"""A real clip of more than 100 frames with sound, in windows: both entry points, and a kill in between."""

from __future__ import annotations

import json
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tav.config import no_own_settings
from tav_model.video import read_video, write_video
from tests.support.killing import CLIP, SETTINGS, check_entry_points_and_a_kill
from tests.support.models import small_base
from tests.support.projects import change_params, fresh_clone
from tests.support.videos import write_tone

FRAMES, FPS = 104, Fraction(24)


def long_project(folder: Path) -> Path:
    """A project with a real clip, forth and back until it is long enough, and a tone; one prompt, window by window."""
    clips = os.environ.get("TAV_TEST_CLIPS")
    if not clips:
        pytest.skip("TAV_TEST_CLIPS does not name the folder of the real clips")
    project = fresh_clone(folder)
    small_base(project / "models/tiny")
    frames, _ = read_video(Path(clips) / "man-skiing.mp4", height=64, width=64)
    forth_and_back = np.concatenate([frames, frames[-2:0:-1]])
    looped = np.concatenate([forth_and_back] * (FRAMES // len(forth_and_back) + 1))[:FRAMES]
    write_tone(folder / "tone.m4a", float(FRAMES / FPS))
    write_video(project / "data/skiing.mp4", looped, FPS, folder / "tone.m4a")
    (folder / "tone.m4a").unlink()
    (project / "data/skiing.csv").write_text("prompt,name\na red man is skiing,red\n")
    clip = {"video": "data/skiing.mp4", "caption": "a man is skiing", "prompts": "data/skiing.csv", **no_own_settings()}
    long = {
        "decode": {**SETTINGS["decode"], "frames": "all"},
        "window": {"context_length": 16},
        "edit": {"steps": 2, "autoregressive": True},
        "invert": {"steps": 2},
    }
    change_params(project, SETTINGS | long, {CLIP: clip})
    return project


def a_window_is_finished(project: Path) -> bool:
    return bool(list((project / ".tav/rows" / CLIP).glob("*.partial/window-00001.safetensors")))


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_long_clip_by_both_entry_points_and_after_a_kill(tmp_path: Path) -> None:
    project = check_entry_points_and_a_kill(long_project(tmp_path / "template"), tmp_path, a_window_is_finished)
    edits = project / "results" / CLIP / "edits"
    record = json.loads((edits / "red.json").read_text())
    assert (record["frames"], Fraction(record["fps"])) == (FRAMES, FPS)
    with av.open(str(edits / "red.mp4")) as container:
        assert container.streams.video[0].frames == FRAMES and container.streams.video[0].average_rate == FPS
        sound = sum(frame.samples for frame in container.decode(audio=0)) / container.streams.audio[0].rate
        assert sound == pytest.approx(FRAMES / FPS, abs=0.1)
