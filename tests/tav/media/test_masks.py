"""Masks from images, folders, videos and keyed boxes."""

import json

import numpy as np
import pytest
from PIL import Image

from tav.config import DecodeParams
from tav.media.masks import FORMS, check_mask, load_mask
from tav_model.errors import TavError
from tav_model.video import write_video

DECODE = DecodeParams(frames=3, width=64, height=64)
LEFT = np.zeros((64, 64), np.uint8)
LEFT[:, :32] = 255


def test_image_serves_for_all_frames(tmp_path):
    Image.fromarray(LEFT).save(tmp_path / "mask.png")
    mask = load_mask(tmp_path / "mask.png", DECODE)
    assert mask.dtype == bool and np.array_equal(mask, np.stack([LEFT > 0] * 3))


def test_mask_is_fitted_as_the_clip_is(tmp_path):
    wide = np.zeros((64, 128), np.uint8)
    wide[:, 64:] = 255
    Image.fromarray(wide).save(tmp_path / "mask.png")
    right = np.stack([LEFT == 0] * 3)
    assert np.array_equal(load_mask(tmp_path / "mask.png", DECODE), right)
    padded = load_mask(tmp_path / "mask.png", DECODE.model_copy(update={"fit": "pad"}))
    assert padded[:, 20:44, 34:].all() and not padded[:, :14].any() and not padded[:, :, :30].any()


@pytest.mark.parametrize("count", [3, 5])
def test_folder_has_the_frames_of_the_clip_or_the_selected_ones(tmp_path, count):
    for i in range(count):
        moving = np.zeros((64, 64), np.uint8)
        moving[:, 10 * i : 10 * i + 10] = 255
        Image.fromarray(moving).save(tmp_path / f"{i}.png")
    decode = DecodeParams(frames=3, width=64, height=64, sampling="stride", stride=2)
    mask = load_mask(tmp_path, decode)
    step = 2 if count == 5 else 1
    assert [int(one.any(0).argmax()) for one in mask] == [0, 10 * step, 20 * step]


def test_video(tmp_path):
    frames = np.stack([np.repeat(255 * (np.arange(64) < 16 * i).astype(np.uint8)[None], 64, 0) for i in (1, 2, 3)])
    write_video(tmp_path / "mask.mp4", np.repeat(frames[..., None], 3, -1), 8)
    mask = load_mask(tmp_path / "mask.mp4", DECODE)
    assert np.abs(mask.sum((1, 2)) / 64 - [16, 32, 48]).max() <= 1


def test_boxes_are_interpolated(tmp_path):
    (tmp_path / "boxes.json").write_text(json.dumps({"0": [0, 0, 10, 20], "2": [20, 10, 30, 30]}))
    expected = np.zeros((3, 64, 64), bool)
    expected[0, 0:20, 0:10] = expected[1, 5:25, 10:20] = expected[2, 10:30, 20:30] = True
    assert np.array_equal(load_mask(tmp_path / "boxes.json", DECODE), expected)


@pytest.mark.parametrize(
    "text", ["{}", "[]", '{"0": [1, 2, 3]}', '{"a": [1, 2, 3, 4]}', '{"0": ["x", 2, 3, 4]}', '{"-1": [1, 2, 3, 4]}']
)
def test_other_boxes_are_refused(tmp_path, text):
    (tmp_path / "boxes.json").write_text(text)
    with pytest.raises(TavError, match=r"boxes.json: not keyed boxes; must be"):
        load_mask(tmp_path / "boxes.json", DECODE)


def test_what_is_no_mask_is_refused_by_its_name(tmp_path):
    with pytest.raises(TavError, match=r"missing.mp4: no such file"):
        load_mask(tmp_path / "missing.mp4", DECODE)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(TavError, match=r"broken.png: "):
        load_mask(tmp_path / "broken.png", DECODE)


@pytest.mark.parametrize("mask", [None, "words", "difference", "none", "mask.png", "moving", "mask.mp4", "boxes.json"])
def test_what_is_a_mask_passes_the_check(tmp_path, mask):
    (tmp_path / "moving").mkdir()
    for image in ("mask.png", "moving/0.png", "moving/1.png"):
        Image.fromarray(LEFT).save(tmp_path / image)
    write_video(tmp_path / "mask.mp4", np.zeros((2, 64, 64, 3), np.uint8), 8)
    (tmp_path / "boxes.json").write_text('{"0": [0, 0, 10, 20]}')
    check_mask(tmp_path, mask, "--mask")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.png", "no such file"),
        ("../mask.png", "is not allowed: must be a relative path inside the project"),
        (
            "prompts.csv",
            f"not a video that can be read (Invalid data found when processing input); a mask must be {FORMS}",
        ),
        ("empty.mp4", f"is empty; a mask must be {FORMS}"),
        ("broken.png", "not an image that can be read (cannot identify image file 'broken.png')"),
        ("boxes.json", "not keyed boxes; must be {"),
        ("folder", "no images in the folder (.png, "),
    ],
)
def test_what_is_no_mask_is_refused_by_the_check(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    for file, text in (("prompts.csv", "prompt\na\n"), ("empty.mp4", ""), ("broken.png", "no"), ("boxes.json", "[]")):
        (tmp_path / file).write_text(text)
    with pytest.raises(TavError) as caught:
        check_mask(tmp_path, name, "--mask")
    text = str(caught.value)
    assert text.startswith("--mask: ") and message in text and str(tmp_path) not in text
