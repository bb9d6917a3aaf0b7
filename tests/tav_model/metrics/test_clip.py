"""Metrics of embeddings: values worked out by hand, what they must not depend on, and a tiny CLIP model."""

import json
import math
import shutil
import socket

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tav_model.errors import TavError
from tav_model.metrics.clip import (
    ClipScorer,
    consecutive_consistency,
    frame_accuracy,
    frame_consistency,
    frame_similarities,
    normalise,
    pick_score,
    textual_alignment,
)
from tests.support.tiny_clip import make_clip, texture

RIGHT, UP = [1.0, 0.0], [0.0, 1.0]
DIAGONAL = [1.0, 1.0]
HALF = math.sqrt(0.5)


@st.composite
def embeddings(draw, least=1):
    shape = (draw(st.integers(least, 6)), draw(st.integers(1, 5)))
    rows = draw(hnp.arrays(np.float64, shape, elements=st.floats(-10, 10)))
    rows[:, 0] = np.where(np.abs(rows).max(axis=1) < 1e-3, 1.0, rows[:, 0])  # each row has a direction
    return rows


# From embeddings


def test_frame_consistency_is_the_mean_over_pairs():
    assert frame_consistency(np.array([RIGHT, RIGHT, UP])) == pytest.approx(1 / 3)
    assert frame_consistency(np.array([RIGHT, DIAGONAL, UP])) == pytest.approx(2 * HALF / 3)
    assert frame_consistency(np.array([RIGHT, [-1.0, 0.0]])) == pytest.approx(-1)


def test_frame_similarities_are_the_cosines_of_all_pairs():
    similarities = frame_similarities(np.array([RIGHT, DIAGONAL, UP]) * [[1], [3], [0.5]])
    assert similarities == pytest.approx(np.array([[1, HALF, 0], [HALF, 1, HALF], [0, HALF, 1]]))
    assert frame_similarities(np.array([RIGHT])).tolist() == [[1]]


def test_consecutive_consistency_sees_neighbours_only():
    assert consecutive_consistency(np.array([RIGHT, DIAGONAL, UP])) == pytest.approx(HALF)
    assert consecutive_consistency(np.array([RIGHT, UP, RIGHT])) == pytest.approx(0)


def test_textual_alignment_and_pick_score():
    images = np.array([RIGHT, UP])
    assert textual_alignment(images, np.array(DIAGONAL)) == pytest.approx(HALF)
    assert textual_alignment(images, np.array(RIGHT)) == pytest.approx(0.5)
    assert pick_score(images, np.array(RIGHT), 100.0) == pytest.approx(50)


def test_frame_accuracy_counts_frames_and_a_tie_is_not_closer():
    images = np.array([RIGHT, RIGHT, UP, DIAGONAL])
    assert frame_accuracy(images, np.array(RIGHT), np.array(UP)) == 0.5
    assert frame_accuracy(images, np.array(UP), np.array(RIGHT)) == 0.25
    assert frame_accuracy(images, np.array(UP), np.array(UP)) == 0


def test_a_single_frame_agrees_with_itself():
    assert frame_consistency(np.array([RIGHT])) == consecutive_consistency(np.array([RIGHT])) == 1


@given(embeddings(least=2))
def test_frame_consistency_equals_its_definition(images):
    def cosine(a, b):
        return a @ b / math.sqrt(a @ a) / math.sqrt(b @ b)

    pairs = [cosine(images[i], images[j]) for j in range(len(images)) for i in range(j)]
    assert frame_consistency(images) == pytest.approx(sum(pairs) / len(pairs), abs=1e-9)


@given(embeddings(), st.integers(-600, 600), st.randoms(use_true_random=False))
def test_lengths_never_matter_and_order_matters_to_neighbours_only(images, exponent, random):
    text = np.ones(images.shape[1])
    scaled = images * 2.0**exponent
    for metric in (frame_consistency, consecutive_consistency, lambda x: textual_alignment(x, text)):
        assert metric(scaled) == pytest.approx(metric(images), abs=1e-9)
        assert -1 - 1e-9 <= metric(images) <= 1 + 1e-9
    shuffled = np.array(random.sample(list(images), len(images)))
    assert frame_consistency(shuffled) == pytest.approx(frame_consistency(images), abs=1e-9)


@pytest.mark.parametrize("bad", [[math.nan, 1.0], [math.inf, 1.0], [0.0, 0.0]])
def test_an_embedding_without_a_direction_is_an_error(bad):
    for metric in (frame_consistency, consecutive_consistency, lambda x: textual_alignment(x, np.array(RIGHT))):
        with pytest.raises(TavError, match="embeddings"):
            metric(np.array([RIGHT, bad]))
    with pytest.raises(TavError):
        textual_alignment(np.array([RIGHT]), np.array(bad))
    with pytest.raises(TavError):
        normalise(np.zeros((0, 2)))


# The CLIP model


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip") / "scorer")


def test_frames_and_texts_are_embedded_as_the_model_embeds_them(clip):
    frames = np.stack([texture(20, 28, seed) for seed in range(3)])
    model = CLIPModel.from_pretrained(clip)
    processor, tokenizer = CLIPImageProcessorPil.from_pretrained(clip), CLIPTokenizer.from_pretrained(clip)
    with torch.no_grad():
        result = model(
            pixel_values=processor(images=list(frames), return_tensors="pt").pixel_values,
            **tokenizer(["a cat", "dogs"], padding=True, return_tensors="pt"),
        )

    scorer = ClipScorer(clip)
    images, texts = scorer.embed_frames(frames), scorer.embed_texts(["a cat", "dogs"])
    assert images.dtype == texts.dtype == np.float32
    np.testing.assert_allclose(images, result.image_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(texts, result.text_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, atol=1e-6)
    # the model's own logits are what PickScore averages
    logits = result.logits_per_image[:, 0].mean().item()
    assert pick_score(images, texts[0], scorer.logit_scale) == pytest.approx(logits, rel=1e-4)


def test_embeddings_do_not_depend_on_the_chunk_nor_on_the_other_texts(clip):
    frames = np.stack([texture(16, 16, seed) for seed in range(5)])
    np.testing.assert_allclose(
        ClipScorer(clip, chunk=2).embed_frames(frames), ClipScorer(clip).embed_frames(frames), atol=1e-5
    )
    scorer = ClipScorer(clip)
    alone, beside = scorer.embed_texts(["cat"]), scorer.embed_texts(["cat", "a longer one"])
    np.testing.assert_allclose(alone[0], beside[0], atol=1e-5)
    assert alone[0] @ beside[1] < 0.999


def test_long_texts_are_cut_at_the_models_limit(clip):
    scorer = ClipScorer(clip)
    embedded = scorer.embed_texts(["abcdefghij" + "k" * 100, "abcdefghij" + "z" * 100, "abcdefghiz"])
    np.testing.assert_allclose(embedded[0], embedded[1], atol=1e-6)  # ten letters, start and end: twelve tokens
    assert embedded[0] @ embedded[2] < 0.9999


def test_half_precision_is_close(clip):
    frames = np.stack([texture(16, 16, seed) for seed in range(2)])
    half = ClipScorer(clip, dtype="bfloat16").embed_frames(frames)
    assert half.dtype == np.float32
    assert ((half * ClipScorer(clip).embed_frames(frames)).sum(axis=1) > 0.99).all()


def test_a_folder_is_read_without_the_network(clip, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    ClipScorer(str(clip)).embed_texts(["cat"])


def copied(clip, folder):
    return shutil.copytree(clip, folder / "copy")


def test_weights_of_nan_are_an_error(clip, tmp_path):
    broken = copied(clip, tmp_path)
    weights = load_file(broken / "model.safetensors")
    weights["visual_projection.weight"][:] = math.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    scorer = ClipScorer(broken)
    scorer.embed_texts(["cat"])
    with pytest.raises(TavError, match="copy: embeddings of frames: NaN or infinite"):
        scorer.embed_frames(texture(16, 16)[None])


def assert_one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_missing_folder_is_one_line(tmp_path):
    with pytest.raises(TavError) as error:
        ClipScorer(tmp_path / "nowhere")
    assert_one_line(error, "nowhere", "not a folder")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "preprocessor_config.json", "tokenizer.json", "config.json"])
def test_a_folder_that_lacks_a_file_is_one_line(clip, tmp_path, name):
    broken = copied(clip, tmp_path)
    (broken / name).unlink()
    with pytest.raises(TavError) as error:
        ClipScorer(broken)
    assert_one_line(error, str(broken))


@pytest.mark.slow
def test_a_truncated_file_or_another_model_is_one_line(clip, tmp_path, capfd):
    broken = copied(clip, tmp_path)
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TavError) as error:
        ClipScorer(broken)
    assert_one_line(error, str(broken), "not a CLIP model")

    (broken / "model.safetensors").write_bytes(whole)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "projection_dim": 4}))
    with pytest.raises(TavError) as error:
        ClipScorer(broken)
    assert_one_line(error, str(broken), "projection.weight")

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPTextModel(CLIPTextConfig(**small, vocab_size=54)).save_pretrained(broken)
    capfd.readouterr()
    with pytest.raises(TavError) as error:
        ClipScorer(broken)
    assert_one_line(error, str(broken), "not a CLIP model")
    assert capfd.readouterr().err == ""


def test_frames_of_another_kind_are_not_embedded(clip):
    with pytest.raises(TavError, match="f h w c"):
        ClipScorer(clip).embed_frames(np.zeros((2, 16, 16, 3), np.float32))


def test_frames_three_pixels_high_are_not_taken_for_channels(clip):
    frame = texture(3, 40)
    pixels = CLIPImageProcessorPil.from_pretrained(clip)(images=Image.fromarray(frame), return_tensors="pt")
    with torch.no_grad():
        expected = normalise(CLIPModel.from_pretrained(clip).get_image_features(**pixels).pooler_output.numpy())
    np.testing.assert_allclose(ClipScorer(clip).embed_frames(frame[None]), expected, atol=1e-5)


def test_pickled_weights_are_not_read(clip, tmp_path):
    pickled = copied(clip, tmp_path)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(TavError) as error:
        ClipScorer(pickled)
    assert_one_line(error, str(pickled), "safetensors")
