"""Masks from images, folders, videos and keyed boxes."""

import json

import numpy as np
import pytest
from PIL import Image

from tav.config import DecodeParams
from tav.media.masks import load_mask
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
