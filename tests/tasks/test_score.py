"""The stage score on a made folder of edits: what it writes, that it writes the same twice, what it refuses."""

import csv
import dataclasses
import json
from fractions import Fraction

import numpy as np
import pytest
import torch

from tasks.score import score
from tav.config import ScoreParams
from tav.config.results import read_scores
from tav.runtime.events import EventStream
from tav.runtime.progress import Progress
from tav_model.errors import TavError
from tav_model.files import write_json
from tav_model.metrics.clip import (
    ClipScorer,
    consecutive_consistency,
    frame_accuracy,
    frame_consistency,
    textual_alignment,
)
from tav_model.tensors import save_tensors
from tav_model.video import read_video, write_video
from tests.support.tiny_clip import make_clip, texture
from toyworld import WEIGHTS
from toyworld.judge import Verdict
from toyworld.renderer import render
from toyworld.scenes import Scene, Truth

PLAIN = {"warping_error", "flicker"}
CLIP = {"frame_consistency", "consecutive_consistency", "textual_alignment"}
COMPARED = {"excess_flicker", "motion_fidelity", "frame_accuracy", "alignment_gain"}
KEPT = {"psnr_kept", "ssim_kept"}
FRAMES, SIZE = 4, 32


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("models") / "scorer")


@pytest.fixture
def clip(tmp_path):
    """A still pattern that lights up a little at its end, and two edits: ``steady`` repaints it, ``wild`` is noise."""
    source = np.repeat(texture(SIZE, SIZE)[None] // 2, FRAMES, axis=0)
    source[-1] += 12
    add_source(tmp_path, source)
    add_edit(tmp_path, "steady", 255 - source, prompt='a "cat", drawn', category="style")
    noise = np.random.default_rng(0).integers(0, 256, source.shape, dtype=np.uint8)
    add_edit(tmp_path, "wild", noise, prompt="dogs", category=None)
    return tmp_path


def add_source(folder, frames):
    save_tensors(folder / "frames/frames.safetensors", {"frames": torch.from_numpy(frames)}, {"fps": "8"})
    write_video(folder / "frames/source.mp4", frames, Fraction(8))


def add_edit(folder, name, frames, **record):
    (folder / "edits").mkdir(exist_ok=True)
    write_video(folder / "edits" / f"{name}.mp4", frames, Fraction(8))
    write_json(folder / "edits" / f"{name}.json", {"name": name, **record})


def run(clip, model=None, pickscore=None, out="scores", **options):
    params = ScoreParams(clip_model=model and "the scorer", pickscore_model=pickscore and "the other")
    paths = {"the scorer": str(model), "the other": str(pickscore)}
    return score(
        clip / "frames", clip / "edits", clip / out, caption="a cat", params=params, resolve_model=paths.get, **options
    )


def test_pixels_outside_of_the_mask_are_compared_with_the_source(clip):
    source = read_video(clip / "frames/source.mp4")[0]
    left = np.zeros(source.shape[:3], bool)
    left[:, :, : SIZE // 2] = True
    half = source.copy()
    half[~left] = 255 - half[~left]
    add_edit(clip, "half", half, prompt="a dog")
    metrics = run(clip, kept=lambda video: left if video.stem == "half" else None)
    assert metrics["edits"]["half"]["psnr_kept"] > 30 and metrics["edits"]["half"]["ssim_kept"] > 0.9
    assert not KEPT & set(metrics["edits"]["steady"])
    inside = run(clip, out="inside", kept=lambda _: ~left)["edits"]["half"]
    assert inside["psnr_kept"] < 20


def test_metrics_without_a_model(clip):
    metrics = run(clip)
    assert set(metrics) == {"source", "mean", "edits"}
    assert set(metrics["source"]) == PLAIN
    assert set(metrics["edits"]) == {"steady", "wild"}
    assert metrics["source"]["warping_error"] < 0.005
    assert metrics["source"]["flicker"] == pytest.approx(12 / 255 / (FRAMES - 1), rel=0.2)

    steady, wild = metrics["edits"]["steady"], metrics["edits"]["wild"]
    assert set(steady) == set(wild) == set(metrics["mean"]) == {*PLAIN, "excess_flicker", "motion_fidelity"}
    assert steady["motion_fidelity"] > wild["motion_fidelity"]
    for name in set(steady) - {"motion_fidelity"}:
        assert steady[name] < 0.02 < wild[name]
        assert metrics["mean"][name] == pytest.approx((steady[name] + wild[name]) / 2, abs=2e-6)
    assert wild["excess_flicker"] == pytest.approx(wild["flicker"] - metrics["source"]["flicker"], abs=2e-6)


def test_metrics_with_both_models(clip, model):
    metrics = run(clip, model, pickscore=model)
    assert set(metrics["source"]) == {*PLAIN, *CLIP, "pick_score"}
    for values in metrics["edits"].values():
        assert set(values) == {*PLAIN, *CLIP, *COMPARED, "pick_score"}
        assert values["frame_accuracy"] * FRAMES % 1 == 0
    assert metrics["source"]["frame_consistency"] > 0.9
    steady, wild = metrics["edits"]["steady"], metrics["edits"]["wild"]
    assert wild["frame_consistency"] < steady["frame_consistency"] <= 1
    assert wild["consecutive_consistency"] < steady["consecutive_consistency"] <= 1
    # here both models are one, with CLIP's initial temperature, exp(2.6592)
    for values in (metrics["source"], steady, wild, metrics["mean"]):
        assert values["pick_score"] == pytest.approx(np.exp(2.6592) * values["textual_alignment"], abs=1e-4)


def test_each_edit_is_scored_with_its_own_prompt_and_the_source_with_the_caption(clip, model):
    metrics = run(clip, model)
    scorer = ClipScorer(model)
    caption, *prompts = scorer.embed_texts(["a cat", 'a "cat", drawn', "dogs"])
    source = scorer.embed_frames(read_video(clip / "frames/source.mp4")[0])
    assert metrics["source"]["textual_alignment"] == pytest.approx(textual_alignment(source, caption), abs=1e-5)
    for name, prompt in zip(("steady", "wild"), prompts, strict=True):
        images, values = scorer.embed_frames(read_video(clip / f"edits/{name}.mp4")[0]), metrics["edits"][name]
        assert values["textual_alignment"] == pytest.approx(textual_alignment(images, prompt), abs=1e-5)
        assert values["frame_accuracy"] == frame_accuracy(images, prompt, caption)
        gain = textual_alignment(images, prompt) - textual_alignment(source, prompt)
        assert values["alignment_gain"] == pytest.approx(gain, abs=1e-5)
        assert values["frame_consistency"] == pytest.approx(frame_consistency(images), abs=1e-5)
        assert values["consecutive_consistency"] == pytest.approx(consecutive_consistency(images), abs=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_scores_do_not_depend_on_how_many_frames_are_in_memory(clip, model, monkeypatch, size):
    kept = np.zeros((FRAMES, SIZE, SIZE), bool)
    kept[:-1, :20] = True  # In the last part, nothing stays.
    whole = run(clip, model, kept=lambda _: kept)
    monkeypatch.setattr("tasks.score.PART", size)
    parts = run(clip, model, kept=lambda _: kept)
    assert whole["edits"]["wild"].keys() >= KEPT
    for name, scores in {**whole["edits"], "source": whole["source"]}.items():
        assert (parts["source"] if name == "source" else parts["edits"][name]) == pytest.approx(scores, abs=1e-5)


def test_the_caption_as_a_prompt_has_no_gain(clip, model):
    write_json(clip / "edits/steady.json", {"name": "steady", "prompt": "a cat"})
    edits = run(clip, model)["edits"]
    assert "alignment_gain" not in edits["steady"] and "alignment_gain" in edits["wild"]


def test_edits_of_a_rendered_clip_are_compared_with_their_truth(tmp_path):
    scene = Scene("cube", "green", "snow")
    truth = Truth(scene, 24, {"blue": scene.edited(colour="blue"), "unchanged": scene.edited(sky="night")})
    indexes = [0, 9, 23]
    times = truth.times(indexes)
    add_source(tmp_path, np.stack([render(scene, time) for time in times]))
    add_edit(tmp_path, "blue", np.stack([render(truth.edits["blue"], time) for time in times]), prompt="a blue cube")
    add_edit(tmp_path, "unchanged", np.stack([render(scene, time) for time in times]), prompt="a green cube at night")
    add_edit(tmp_path, "unknown", np.stack([render(scene, time) for time in times]), prompt="a cube of jelly")

    metrics = run(tmp_path, WEIGHTS / "scorer", truth=truth, indexes=indexes)
    blue, unchanged, unknown = (metrics["edits"][name] for name in ("blue", "unchanged", "unknown"))
    of_truth = set(blue) - set(unknown) - KEPT
    assert of_truth == {field.name for field in dataclasses.fields(Verdict)} and of_truth <= set(unchanged)
    assert blue["track_error"] < 0.03 and blue["attributes_edited"] == blue["attributes_kept"] == 1
    assert abs(blue["consistency_to_truth"]) < 0.02 and blue["psnr_to_truth"] > 30
    assert unchanged["attributes_edited"] == 0 and unchanged["attributes_kept"] == 1 and unchanged["psnr_to_truth"] < 15
    assert metrics["mean"]["attributes_edited"] == 0.5  # of those whose truth is known

    scores = read_scores(tmp_path / "scores")
    assert scores == metrics["edits"]  # without blanks for what is unknown
    assert set(blue) >= KEPT and not KEPT & set(unknown)  # Pixels around the cube stay, whatever its colour.
    assert blue["psnr_kept"] > 30 and blue["ssim_kept"] > 0.9
    assert not of_truth & set(run(tmp_path, truth=truth, indexes=indexes)["mean"])  # names need a scorer


def test_the_files_hold_what_is_returned_and_are_the_same_twice(clip, model):
    (clip / "edits/.tmp-1.mp4").write_bytes(b"left by a killed run")
    metrics = run(clip, model)
    written = json.loads((clip / "scores/metrics.json").read_text())
    assert written == {"source": metrics["source"], "mean": metrics["mean"]}
    with (clip / "scores/scores.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["name"], row["prompt"], row["category"]) for row in rows] == [
        ("steady", 'a "cat", drawn', "style"),
        ("wild", "dogs", ""),
    ]
    for row in rows:
        numbers = {name: float(row[name]) for name in row if name not in ("name", "prompt", "category")}
        assert numbers == metrics["edits"][row["name"]]

    run(clip, model, out="again")
    names = ["consistency.json", "metrics.json", "scores.csv"]
    assert sorted(path.name for path in (clip / "again").iterdir()) == names
    for name in names:
        assert (clip / "again" / name).read_bytes() == (clip / "scores" / name).read_bytes()


def test_the_similarities_are_what_the_consistency_is_the_mean_of(clip, model):
    metrics = run(clip, model)
    written = json.loads((clip / "scores/consistency.json").read_text())
    assert set(written) == {"source", "edits"} and set(written["edits"]) == {"steady", "wild"}
    pairs = np.triu_indices(FRAMES, 1)
    for rows, values in [(written["source"], metrics["source"])] + [
        (written["edits"][name], metrics["edits"][name]) for name in ("steady", "wild")
    ]:
        similarities = np.array(rows)
        assert similarities.shape == (FRAMES, FRAMES) and (similarities == similarities.T).all()
        assert (similarities.diagonal() == 1).all()
        assert similarities[pairs].mean() == pytest.approx(values["frame_consistency"], abs=1e-4)
        assert similarities.diagonal(1).mean() == pytest.approx(values["consecutive_consistency"], abs=1e-4)


def test_similarities_of_a_long_clip_are_those_of_some_frames(clip, model, monkeypatch):
    whole = run(clip, model)
    every = json.loads((clip / "scores/consistency.json").read_text())["source"]
    monkeypatch.setattr("tasks.score.PICTURE_FRAMES", 2)
    assert run(clip, model) == whole
    ends = [every[i][j] for i in (0, -1) for j in (0, -1)]
    assert np.ravel(json.loads((clip / "scores/consistency.json").read_text())["source"]).tolist() == ends


def test_without_a_model_there_are_no_similarities(clip):
    run(clip)
    assert json.loads((clip / "scores/consistency.json").read_text()) == {"source": None, "edits": {}}


def test_scores_of_an_earlier_run_are_replaced(clip):
    (clip / "scores").mkdir()
    (clip / "scores/old.csv").write_text("old")
    run(clip)
    assert not (clip / "scores/old.csv").exists()


def test_progress_counts_videos(clip):
    progress = Progress(EventStream(), stage="score", unit="video")
    run(clip, progress=progress)
    assert progress.done == progress.total == 3  # the source and two edits


def test_one_frame(tmp_path, model):
    frame = texture(SIZE, SIZE)[None]
    add_source(tmp_path, frame)
    add_edit(tmp_path, "one", frame, prompt="dogs", category=None)
    metrics = run(tmp_path, model)
    for values in (metrics["source"], metrics["edits"]["one"]):
        assert values["warping_error"] == values["flicker"] == 0
        assert values["frame_consistency"] == values["consecutive_consistency"] == 1


def test_no_edits(clip):
    for path in (clip / "edits").iterdir():
        path.unlink()
    with pytest.raises(TavError, match="no edit to score"):
        run(clip)
    (clip / "edits").rmdir()
    with pytest.raises(TavError, match="no edit to score"):
        run(clip)


def test_what_is_wrong_with_an_edit_is_named_and_nothing_is_written(clip):
    edit = clip / "edits/wild.json"
    for text, message in (("[]", "no prompt"), ('{"prompt": 3}', "no prompt"), ("{", "not a JSON file")):
        edit.write_text(text)
        with pytest.raises(TavError, match=f"wild.json: {message}"):
            run(clip)
    edit.unlink()
    with pytest.raises(TavError, match=r"wild\.json: no such file"):
        run(clip)
    add_edit(clip, "wild", np.zeros((FRAMES - 1, SIZE, SIZE, 3), np.uint8), prompt="dogs")
    with pytest.raises(TavError, match=r"wild\.mp4: frames: 3 of 32x32, but the source has 4 of 32x32"):
        run(clip)
    assert not (clip / "scores").exists()


def test_a_model_that_is_not_there(clip, tmp_path):
    with pytest.raises(TavError, match="nowhere: not a folder"):
        run(clip, tmp_path / "nowhere")
