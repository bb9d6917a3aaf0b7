"""Pictures: the same from the same scene, what the scene says is in them, and the committed clips show them."""

import hashlib
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from tests.toyworld.test_scenes import scenes
from toyworld.backdrops import BLOCK, SIDE, backdrop
from toyworld.clips import CLIPS, FRAMES, main
from toyworld.renderer import empty_picture, render, render_clip, render_with_mask
from toyworld.scenes import GROUNDS, MOTIONS, OBJECTS, SKIES, STYLES, Scene

DATA = Path(__file__).resolve().parents[2] / "data"


@settings(max_examples=40, deadline=None)
@given(scenes())
def test_pictures_have_their_shape_and_the_object_its_place(scene: Scene):
    for moment in (0.0, 0.37, 1.0):
        picture, mask = render_with_mask(scene, moment)
        assert picture.shape == (SIDE, SIDE, 3) and picture.dtype == np.uint8
        assert mask.shape == (SIDE, SIDE) and mask.min() >= 0 and mask.max() <= 1
        assert np.array_equal(picture, render(scene, moment))
        pose = scene.pose(moment)
        margin = 1.3 * pose.radius
        if margin < pose.x < 1 - margin and margin < pose.y < 1 - margin:
            down, right = (np.average(axis, weights=mask) / SIDE for axis in np.indices(mask.shape))
            coarse = BLOCK / SIDE if scene.style == "pixel art" else 0.0
            assert np.hypot(right - pose.x, down - pose.y) < 0.35 * pose.radius + coarse
            assert 0.3 < mask.sum() / (np.pi * (pose.radius * SIDE) ** 2) < 1.4 * (1 + coarse / pose.radius) ** 2


def test_only_object_and_shadow_differ_from_the_landscape():
    scene = Scene(motion="rising")
    picture, mask = render_with_mask(scene, 1.0)
    different = np.abs(picture / 255 - empty_picture(scene)).max(-1) > 0.01
    shadow = np.zeros_like(different)
    shadow[100:122] = True
    assert not (different & (mask == 0) & ~shadow).any()
    assert (different & (mask > 0.5)).mean() > 0.8 * (mask > 0.5).mean()


@pytest.mark.parametrize("style", STYLES)
def test_styles_look_their_part(style: str):
    scene = Scene(style=style)
    picture = render(scene, 0.5).astype(int)
    blocks = picture.reshape(SIDE // BLOCK, BLOCK, SIDE // BLOCK, BLOCK, 3)
    assert (np.ptp(blocks, axis=(1, 3)).max() == 0) == (style == "pixel art")
    mask = render_with_mask(scene, 0.5)[1] > 0.5
    dark = (picture[mask].max(-1) < 60).mean()
    assert (dark > 0.05) == (style == "cartoon")  # outlines


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_differ_and_are_mostly_of_their_colour(name: str):
    scene = Scene(object=name, colour="blue", motion="rising")
    others = [render_with_mask(Scene(object=o, colour="blue", motion="rising"), 0.5)[1] for o in OBJECTS if o != name]
    picture, mask = render_with_mask(scene, 0.5)
    assert all(np.abs(mask - other).sum() > 100 for other in others)
    red, _, blue = np.moveaxis(picture[mask > 0.9].astype(int), -1, 0)
    assert (blue > red + 40).mean() > 0.5


def test_the_landscape_joins_at_its_ends_and_every_one_is_of_its_own():
    pictures = {(g, s, t): backdrop(g, s, t) for g in GROUNDS for s in SKIES for t in STYLES}
    assert len({hashlib.sha256(picture.tobytes()).digest() for picture in pictures.values()}) == 45
    for (_, _, style), picture in pictures.items():
        assert picture.min() >= 0 and picture.max() <= 1
        seam = np.abs(picture[:, 0] - picture[:, -1]).mean()
        # No more than between any two neighbouring blocks of columns.
        inside = np.abs(np.diff(picture[:, ::BLOCK], axis=1)).mean((0, 2)).max()
        assert seam <= inside + 1e-6, style


def test_another_process_renders_the_same():
    clip = np.concatenate([render_clip(Scene(motion=motion), 3) for motion in MOTIONS])
    code = (
        "import hashlib, numpy as np; from toyworld.renderer import render_clip; from toyworld.scenes import MOTIONS, Scene;"
        "print(hashlib.sha256(np.concatenate([render_clip(Scene(motion=m), 3) for m in MOTIONS]).tobytes()).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == hashlib.sha256(clip.tobytes()).hexdigest()


def test_a_frame_takes_milliseconds():
    chosen = [Scene(object=name, style=style) for name in OBJECTS for style in STYLES]
    for scene in chosen:
        render(scene, 0.3)  # The landscapes are made once.
    start = time.process_time()
    for scene in chosen:
        render(scene, 0.7)
    assert (time.process_time() - start) / len(chosen) < 0.02


@pytest.mark.parametrize("name", CLIPS)
def test_committed_clips_show_what_is_rendered(name: str):
    import av

    with av.open(str(DATA / f"{name}.mp4")) as container:
        assert container.streams.video[0].average_rate == 12
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    rendered = render_clip(CLIPS[name].scene, FRAMES)
    assert frames.shape == rendered.shape == (24, 128, 128, 3)
    assert np.abs(frames.astype(int) - rendered).mean() < 3


def test_the_command_writes_the_committed_files_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path)]) == 0
    for name in CLIPS:
        for file in (f"{name}.csv", f"scenes/{name}.json"):
            assert (tmp_path / file).read_bytes() == (DATA / file).read_bytes()
        assert (tmp_path / f"{name}.mp4").stat().st_size > 0
    (tmp_path / "file").touch()
    assert main([str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err
