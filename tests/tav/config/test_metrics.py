"""The catalogue describes exactly the scores that the pipeline writes."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks.score import score
from tav.config import ScoreParams
from tav.config.metrics import HEADLINES, INCONSISTENT, METRICS, shortcomings
from tav.config.results import read_scores
from tav_model.files import write_json
from tav_model.metrics.clip import ClipScorer, frame_consistency, textual_alignment
from tav_model.tensors import save_tensors
from tav_model.video import write_video
from toyworld import WEIGHTS
from toyworld.captions import caption
from toyworld.renderer import render
from toyworld.samples import random_scene
from toyworld.scenes import Scene, Truth


@pytest.mark.slow
def test_every_score_that_the_pipeline_writes_is_in_the_catalogue(tmp_path: Path) -> None:
    """Score a rendered clip with everything on: a CLIP model, a PickScore model and a known truth."""
    scene, indexes = Scene("cube", "green", "snow"), [0, 9, 23]
    truth = Truth(scene, 24, {"blue": scene.edited(colour="blue")})
    times = truth.times(indexes)
    frames = np.stack([render(scene, time) for time in times])
    save_tensors(tmp_path / "frames/frames.safetensors", {"frames": torch.from_numpy(frames)}, {"fps": "8"})
    write_video(tmp_path / "frames/source.mp4", frames, Fraction(8))
    edit = np.stack([render(truth.edits["blue"], time) for time in times])
    (tmp_path / "edits").mkdir()
    write_video(tmp_path / "edits/blue.mp4", edit, Fraction(8))
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


def test_scores_that_are_far_below_the_sources_are_called_that() -> None:
    source = {"frame_consistency": 0.98, "textual_alignment": 0.6}
    good = {"frame_consistency": 0.98 - INCONSISTENT + 1e-6, "textual_alignment": 0.5, "alignment_gain": 0.01}
    assert shortcomings(good, source) == []
    assert shortcomings({}, {}) == shortcomings({"flicker": 0.1}, {"flicker": 0.0}) == []  # without a CLIP model
    assert shortcomings(good | {"alignment_gain": 0.0}, source) == [
        "the prompt does not show: the frames match it no better than the source's do; try a larger guidance_scale"
    ]
    assert shortcomings(good | {"frame_consistency": 0.86}, source) == [
        "the frames do not belong together: frame consistency 0.86, source 0.98"
    ]


@pytest.mark.slow
def test_correct_edits_have_no_shortcomings_and_wrong_ones_have() -> None:
    """Rendered edits of random scenes, as they should be, unedited, and with the source in two of eight frames."""
    scorer, rng = ClipScorer(str(WEIGHTS / "scorer"), "cpu"), np.random.default_rng(1)
    wrong = 0
    for _ in range(20):
        # The scorer knows objects without patterns best.
        scene, other = dataclasses.replace(random_scene(rng), pattern="none"), random_scene(rng)
        truth = scene.edited(object=other.object, colour=other.colour, ground=other.ground)
        if (scene.object, scene.colour, scene.ground) == (truth.object, truth.colour, truth.ground):
            continue
        times = np.linspace(0, 1, 8)
        images, edited = (scorer.embed_frames(np.stack([render(s, time) for time in times])) for s in (scene, truth))
        text, own = scorer.embed_texts([caption(truth), caption(scene)])
        source = _scores(images, own, images)
        assert shortcomings(_scores(edited, text, images), source) == []
        assert shortcomings(_scores(images, text, images), source)[0].startswith("the prompt does not show")
        edited[[2, 5]] = images[[2, 5]]
        wrong += bool(shortcomings(_scores(edited, text, images), source))
    assert wrong >= 18


def _scores(images: np.ndarray, text: np.ndarray, source: np.ndarray) -> dict[str, float]:
    gain = textual_alignment(images, text) - textual_alignment(source, text)
    return {"frame_consistency": frame_consistency(images), "alignment_gain": gain}
