"""The catalogue describes exactly the scores that the pipeline writes."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks.score import score
from tav.config import ScoreParams
from tav.config.metrics import HEADLINES, METRICS
from tav.config.results import read_scores
from tav.media.videos import write_mp4
from tav_model.files import write_json
from tav_model.tensors import save_tensors
from toyworld import WEIGHTS
from toyworld.renderer import render
from toyworld.scenes import Scene, Truth


@pytest.mark.slow
def test_every_score_that_the_pipeline_writes_is_in_the_catalogue(tmp_path: Path) -> None:
    """Score a rendered clip with everything on: a CLIP model, a PickScore model and a known truth."""
    scene, indexes = Scene("cube", "green", "snow"), [0, 9, 23]
    truth = Truth(scene, 24, {"blue": scene.edited(colour="blue")})
    times = truth.times(indexes)
    frames = np.stack([render(scene, time) for time in times])
    save_tensors(tmp_path / "frames/frames.safetensors", {"frames": torch.from_numpy(frames)}, {"fps": "8"})
    write_mp4(tmp_path / "frames/source.mp4", frames, Fraction(8))
    edit = np.stack([render(truth.edits["blue"], time) for time in times])
    (tmp_path / "edits").mkdir()
    write_mp4(tmp_path / "edits/blue.mp4", edit, Fraction(8))
    write_json(tmp_path / "edits/blue.json", {"name": "blue", "prompt": "a blue cube"})
    params = ScoreParams(clip_model="scorer", pickscore_model="scorer")
    score(
        tmp_path / "frames",
        tmp_path / "edits",
        tmp_path / "scores",
        caption="a green cube",
        params=params,
        resolve_model=lambda name: str(WEIGHTS / name),
        truth=truth,
        indexes=indexes,
    )
    written = json.loads((tmp_path / "scores/metrics.json").read_text())
    names = {*written["source"], *written["mean"], *read_scores(tmp_path / "scores")["blue"]}
    assert names == set(METRICS)


def test_entries_are_complete_sentences_and_formats_work() -> None:
    for key, metric in METRICS.items():
        assert metric.key == key
        assert metric.label
        assert metric.explanation[0].isupper()
        assert metric.explanation.endswith(".")
        assert metric.text(0.25)
    assert METRICS["excess_flicker"].text(-0.0123) == "\N{MINUS SIGN}0.012"
    assert METRICS["attributes_kept"].text(0.5) == "50%"


def test_headlines_are_scores_of_the_catalogue() -> None:
    assert set(HEADLINES) <= set(METRICS.values())
