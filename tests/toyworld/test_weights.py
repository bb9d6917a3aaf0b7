"""The base model in the repository: complete, small, and as good as documented, on a part of the benchmark."""

import numpy as np
import pytest
import torch

from benchmarks import toyworld as benchmark
from tav_model.base_models import load_part
from tav_model.files import read_json
from tav_model.metrics.clip import ClipScorer
from tav_model.tensors import load_tensors
from tav_model.vocabulary import FILE, read_vocabulary
from tests.support.projects import ROOT
from toyworld import WEIGHTS
from toyworld.captions import caption, vocabulary, vocabulary_record
from toyworld.judge import Judge
from toyworld.renderer import empty_picture, render
from toyworld.samples import random_scene
from toyworld.scenes import Scene
from toyworld.truth import look

FILES = sorted(WEIGHTS.rglob("*.safetensors"))


def test_all_parts_fit_in_40_megabytes():
    assert {file.parent.name for file in FILES} == {"vae", "unet", "text_encoder", "scorer", "edges", "depth"}
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) < 40e6
    assert all(file.stat().st_size < 5e6 for file in (WEIGHTS / "controlnet").rglob("*.safetensors"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_weights_are_finite_half_precision(file):
    for name, tensor in load_tensors(file)[0].items():
        assert tensor.dtype in (torch.float16, torch.int64), name
        assert torch.isfinite(tensor).all(), name


COUNT = 96  # pictures


def test_the_model_declares_the_words_that_its_tokenizer_does_not_spell():
    """Each known word is one token; what the file says is what the captions of the training contain."""
    assert read_json(WEIGHTS / FILE) == vocabulary_record()
    tokenizer = load_part(str(WEIGHTS), "tokenizer")
    known = read_vocabulary(str(WEIGHTS))
    assert known is not None and known.words == vocabulary()
    assert {len(tokenizer(word).input_ids) for word in known.words} == {3}  # with the two special tokens
    assert (ROOT / known.documentation).is_file()


@pytest.mark.slow
def test_the_autoencoder_keeps_pictures():
    complete, on_object = benchmark.measure_vae(WEIGHTS, COUNT)
    assert complete.value >= 36 and on_object.value >= 30


@pytest.mark.slow
def test_the_scorer_knows_the_world():
    assert min(measure.value for measure in benchmark.measure_scorer(WEIGHTS, COUNT)) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("count", [12, pytest.param(24, marks=pytest.mark.long)])
def test_pictures_of_held_out_combinations_show_their_captions(count: int):
    rng = np.random.default_rng(11)
    scenes = [random_scene(rng, unseen=True) for _ in range(count)]
    pictures = benchmark.text_to_image(WEIGHTS, [caption(scene) for scene in scenes])
    right = Judge(ClipScorer(WEIGHTS / "scorer")).shares(pictures, scenes)
    assert min(right.values()) >= 0.8, right
    seen = [look(picture) for picture in pictures]
    for name in ("colour", "ground", "sky"):
        assert np.mean([getattr(one, name) == getattr(s, name) for one, s in zip(seen, scenes, strict=True)]) >= 0.8, (
            name
        )


def test_a_verdict_distinguishes_a_right_edit_from_the_source():
    rng = np.random.default_rng(12)
    judge, times = Judge(ClipScorer(WEIGHTS / "scorer")), [0.1, 0.4, 0.9]
    scene = random_scene(rng)
    truth = scene.edited(
        sky="night" if scene.sky == "day" else "day", colour="blue" if scene.colour != "blue" else "red"
    )
    right = judge.verdict(np.stack([render(truth, time) for time in times]), scene, truth, times)
    wrong = judge.verdict(np.stack([render(scene, time) for time in times]), scene, truth, times)
    assert right.psnr_to_truth == 100 and right.track_error < 0.03 and right.consistency_to_truth == 0
    assert right.attributes_edited == right.attributes_kept == 1
    assert wrong.attributes_edited == 0 and wrong.attributes_kept == 1
    assert wrong.track_error < 0.03 and wrong.psnr_to_truth < 30
    assert right.frames_without_object == wrong.frames_without_object == 0
    assert right.identity_error < 0.5


def test_a_verdict_of_the_source_itself_has_no_edited_attribute():
    judge, times = Judge(ClipScorer(WEIGHTS / "scorer")), [0.1, 0.4, 0.9]
    scene = Scene("ball", "red", "grass")
    verdict = judge.verdict(np.stack([render(scene, time) for time in times]), scene, scene, times)
    assert verdict.attributes_edited == 1 and verdict.attributes_kept == 1 and verdict.psnr_to_truth == 100


def test_a_verdict_counts_frames_without_their_object():
    judge, times = Judge(ClipScorer(WEIGHTS / "scorer")), [0.1, 0.4, 0.9]
    scene = Scene("ball", "red", "grass")
    truth = scene.edited(colour="blue")
    frames = np.stack([render(truth, time) for time in times])
    frames[1] = np.rint(255 * empty_picture(truth)).astype(np.uint8)
    assert judge.verdict(frames, scene, truth, times).frames_without_object == pytest.approx(1 / 3)
