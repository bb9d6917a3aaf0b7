"""Scores of quick edits: measured once, and again only where something has changed."""

from __future__ import annotations

import logging
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks import quick_scores
from tasks.quick_scores import score_quick_edits
from tav.config import ScoreParams
from tav.reports.scores import read_quick_scores
from tav_model.files import read_json, write_json
from tav_model.tensors import save_tensors
from tav_model.video import write_video
from tests.support.tiny_clip import texture

SOURCE = np.repeat(texture(32, 32)[None] // 2, 3, axis=0)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    save_tensors(tmp_path / "frames/frames.safetensors", {"frames": torch.from_numpy(SOURCE)}, {"fps": "8"})
    write_video(tmp_path / "frames/source.mp4", SOURCE, Fraction(8))
    add_edit(tmp_path, "inverse", 255 - SOURCE)
    add_edit(tmp_path, "noise", np.random.default_rng(0).integers(0, 256, SOURCE.shape, dtype=np.uint8))
    return tmp_path


def add_edit(clip: Path, name: str, frames: np.ndarray) -> None:
    (clip / "quick").mkdir(exist_ok=True)
    write_video(clip / f"quick/{name}.mp4", frames, Fraction(8))
    write_json(clip / f"quick/{name}.json", {"prompt": name})


def run(clip: Path, *names: str, caption: str = "a cat") -> None:
    score_quick_edits(
        clip / "quick",
        names,
        clip / "frames",
        caption=caption,
        params=ScoreParams(clip_model=None),
        resolve_model=str,
        device="cpu",
    )


def scored(clip: Path) -> list[str]:
    return sorted(path.stem for path in (clip / "quick/scores").glob("*.json"))


def test_each_edit_is_measured_once(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(clip, "inverse", "noise")
    assert scored(clip) == ["inverse", "noise"]
    found = read_quick_scores(clip / "quick", clip / "quick/noise.mp4")
    assert found is not None and found.scores["excess_flicker"] > 0.1 > found.source["flicker"]

    measured: list[str] = []
    real = quick_scores.load_judge

    def load_judge(frames: Path, caption: str, *others: object) -> object:
        measured.append(caption)
        return real(frames, caption, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(quick_scores, "load_judge", load_judge)
    run(clip, "inverse", "noise")
    assert measured == []
    run(clip, "inverse", "noise", caption="a dog")  # Another reference for all scores.
    assert measured == ["a dog"]


def test_an_edit_that_changed_is_measured_again_and_has_no_scores_until_then(clip: Path) -> None:
    run(clip, "inverse", "noise")
    before = read_json(clip / "quick/scores/noise.json")["scores"]
    add_edit(clip, "noise", SOURCE)
    assert read_quick_scores(clip / "quick", clip / "quick/noise.mp4") is None
    run(clip, "inverse", "noise")
    assert read_json(clip / "quick/scores/noise.json")["scores"]["flicker"] < before["flicker"]


def test_edits_of_an_earlier_tuning_lose_their_scores(clip: Path) -> None:
    run(clip, "inverse", "noise")
    run(clip, "noise")
    assert scored(clip) == ["noise"]


def test_an_edit_that_cannot_be_measured_is_logged_alone(clip: Path, caplog: pytest.LogCaptureFixture) -> None:
    add_edit(clip, "inverse", SOURCE[:2])
    with caplog.at_level(logging.WARNING):
        run(clip, "inverse", "noise")
    assert scored(clip) == ["noise"]
    assert caplog.messages[0].startswith("not scored: ") and "the source has 3" in caplog.messages[0]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"video": "x", "inputs": "y"}'])
def test_damaged_scores_are_none_and_are_replaced(clip: Path, content: str) -> None:
    run(clip, "noise")
    (clip / "quick/scores/noise.json").write_text(content)
    assert read_quick_scores(clip / "quick", clip / "quick/noise.mp4") is None
    run(clip, "noise")
    assert read_quick_scores(clip / "quick", clip / "quick/noise.mp4") is not None
