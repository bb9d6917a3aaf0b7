"""`tav add`: a clip comes into the project complete, or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tav.config import no_own_settings
from tav.media import importing
from tests.support.models import controlnet, small_base
from tests.support.projects import ROOT
from tests.support.tav_command import Tav, change, contents, read_yaml


def test_add_copies_a_video_and_keeps_params_yaml(tav: Tav, new: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / "params.yaml", new / "params.yaml")  # with comments
    before = (new / "params.yaml").read_text()
    video = Path(shutil.copy(new / "data/ball.mp4", tmp_path / "Mein Vidéo (1).MP4"))
    ended = tav(
        "add", video, "--caption", "a ball: red", "--edit", "a blue ball", "--edit", "a cat, red", "--frames", 4
    )
    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[:2] == [
        "mein-video-1",
        "  video    data/mein-video-1.mp4: uses 4 frames of 128x128",
    ]
    warning, following = ended.err.splitlines()
    assert warning.startswith('warning: toyworld does not know "cat"; it knows a ball, cube, ')
    assert following == "next: tav run mein-video-1"
    text = (new / "params.yaml").read_text()
    assert text.startswith(before)
    assert yaml.safe_load(text)["clips"]["mein-video-1"] == {
        "video": "data/mein-video-1.mp4",
        "caption": "a ball: red",
        "prompts": "data/mein-video-1.csv",
        **no_own_settings(),
        "decode": {"frames": 4},
    }
    assert (new / "data/mein-video-1.mp4").read_bytes() == video.read_bytes()
    assert (new / "data/mein-video-1.csv").read_text() == 'prompt\na blue ball\n"a cat, red"\n'
    assert json.loads(tav("status", "mein-video-1", "--json").out)["clips"]["mein-video-1"]["prompts"]["todo"] == [
        "a-blue-ball",
        "a-cat-red",
    ]


def test_add_with_a_mask_copies_it_and_names_it_in_every_row(tav: Tav, new: Path, tmp_path: Path) -> None:
    Image.new("L", (128, 128), 255).save(tmp_path / "Jacket.PNG")
    arguments = ("add", "data/ball.mp4", "--caption", "a ball", "--name", "b", "--edit", "a blue ball")
    ended = tav(*arguments, "--mask", tmp_path / "Jacket.PNG")
    assert ended.code == 0, ended.err
    assert (new / "data/masks/b.png").read_bytes() == (tmp_path / "Jacket.PNG").read_bytes()
    assert (new / "data/b.csv").read_text() == "prompt,mask\na blue ball,data/masks/b.png\n"


def test_add_with_control_names_the_network(tav: Tav, new: Path) -> None:
    network = controlnet(conditioning_embedding_out_channels=(4, 8, 8, 8))
    small_base(new / "models/small")
    network.save_pretrained(new / "models/small/controlnet/edges")
    change(new / "params.yaml", "base_model: toyworld", "base_model: models/small")
    arguments = ("add", "data/ball.mp4", "--caption", "a ball", "--edit", "a blue ball")
    ended = tav(*arguments, "--name", "own", "--control", "canny")
    assert ended.code == 0, ended.err
    ended = tav(
        *arguments, "--name", "named", "--control", "lineart", "--control-model", "models/small/controlnet/edges"
    )
    assert ended.code == 0, ended.err
    clips = read_yaml(new / "params.yaml")["clips"]
    assert clips["own"]["control"] == [{"kind": "canny", "model": "models/small/controlnet/edges"}]
    assert clips["named"]["control"] == [{"kind": "lineart", "model": "models/small/controlnet/edges"}]
    before = contents(new)
    for options, message in (
        (("--control", "lineart"), "--control: models/small comes without a control network for 'lineart'; name one"),
        (("--control-model", "models/small"), "--control-model: needs --control, such as canny"),
        (("--control", "canny", "--control-model", "models/none"), "no model 'models/none': it is neither a folder"),
        (("--control", "pose", "--control-model", "models/small"), "annotator: kind pose needs a model"),
        (("--control", "cany"), "--control: 'cany' is not allowed: must be one of canny, lineart, depth, pose, "),
    ):
        refused = tav(*arguments, "--name", "c", *options)
        assert refused.code == 2 and message in refused.err, refused
    assert contents(new) == before


def test_add_refuses_a_mask_that_is_none_and_changes_nothing(tav: Tav, new: Path, tmp_path: Path) -> None:
    (tmp_path / "mask.png").write_bytes(b"no image")
    before = contents(new)
    arguments = ("add", "data/ball.mp4", "--caption", "a ball", "--name", "b", "--mask")
    ended = tav(*arguments, tmp_path / "mask.png")
    assert ended.code == 2 and f"error: --mask: {tmp_path / 'mask.png'}: not an image that can be read" in ended.err
    ended = tav(*arguments, "data/ball.csv")
    assert ended.code == 2 and "error: --mask: data/ball.csv: not a video" in ended.err
    assert contents(new) == before


def test_add_refers_to_what_is_in_the_project(tav: Tav, new: Path) -> None:
    ended = tav(
        "add", "data/ball.mp4", "--prompt", "a ball", "--name", "b", "--stride", 3, "--size", "128x64", "--json"
    )
    assert json.loads(ended.out) == {
        "name": "b",
        "video": "data/ball.mp4",
        "caption": "a ball",
        "prompts": "data/b.csv",
        "frames": 2,
        "height": 64,
        "width": 128,
        "edits": ["a-ball"],  # The caption: something to run from the start.
    }
    assert read_yaml(new / "params.yaml")["clips"]["b"]["decode"] == {
        "width": 128,
        "height": 64,
        "sampling": "stride",
        "stride": 3,
    }
    assert sorted(path.name for path in (new / "data").iterdir() if path.is_file()) == [
        "b.csv",
        *sorted(f"{name}.{kind}" for name in ("ball", "cube", "fish", "rocket") for kind in ("csv", "mp4")),
    ]


def test_add_takes_prompts_that_are_there_and_what_a_kill_has_left(tav: Tav, new: Path, tmp_path: Path) -> None:
    shutil.copy(new / "data/ball.mp4", tmp_path / "kite.mp4")
    shutil.copy(new / "data/ball.mp4", new / "data/kite.mp4")
    (new / "data/kite.csv").write_text("prompt,seed\na kite,3\n")
    assert json.loads(tav("add", tmp_path / "kite.mp4", "--caption", "a", "--json").out)["edits"] == ["a-kite"]
    assert (new / "data/kite.csv").read_text() == "prompt,seed\na kite,3\n"


def test_add_takes_a_folder_of_images(tav: Tav, new: Path, tmp_path: Path) -> None:
    frames = tmp_path / "frames"
    frames.mkdir()
    for number in range(3):
        Image.new("RGB", (80, 64), (number * 80, 0, 0)).save(frames / f"{number}.png")
    (frames / "secret.txt").write_text("secret")
    assert tav("add", frames, "--caption", "red").code == 0
    assert sorted(path.name for path in (new / "data/frames").iterdir()) == ["0.png", "1.png", "2.png"]


def test_results_are_copied_not_referred_to(tav: Tav, done: Path) -> None:
    ended = tav("add", "results/ball/edits/blue.mp4", "--caption", "a blue ball", "--json")
    assert json.loads(ended.out)["video"] == "data/blue.mp4"


@pytest.mark.parametrize(
    ("video", "options", "error"),
    [
        ("none.mp4", {}, "none.mp4: no such file"),
        ("a\0b.mp4", {}, "null byte"),
        ("text.mp4", {}, "text.mp4: not a video that can be read"),
        ("pipe.mp4", {}, "pipe.mp4: neither a video file nor a folder of images"),
        ("ball.mp4", {"--name": "../x"}, "--name: '../x' is not allowed: must be 1 to 64 of a-z"),
        ("ball.mp4", {"--name": "Ball"}, "--name: 'Ball' is not allowed"),
        ("ball.mp4", {}, "clips: 'ball' already exists; choose another name (--name)"),
        ("ball.mp4", {"--name": "fish"}, "data/fish.mp4: another file exists there; choose another name"),
        ("data/ball.mp4", {"--name": "fish", "--edit": "a"}, "data/fish.csv: has other prompts already"),
        ("ball.mp4", {"--name": "x", "--frames": 25}, "has 24 frames, but 25 are needed"),
        ("ball.mp4", {"--name": "x", "--frames": 0}, "error: --frames: 0 is not allowed: must be a whole number"),
        ("ball.mp4", {"--name": "x", "--frames": "some"}, "'some' is not allowed: must be a whole number between 1"),
        (
            "ball.mp4",
            {"--name": "x", "--size": "500x300", "--start": -1, "--frames": 4},
            "error: --size: width: 500 is not allowed: must be a whole number between 64 and 4096, a multiple of 8; "
            "height: 300 is not allowed: must be a whole number between 64 and 4096, a multiple of 8; "
            "--start: -1 is not allowed: must be a whole number at least 0\n",
        ),
        ("ball.mp4", {"--name": "x", "--size": "big"}, "--size: 'big' is not allowed: must be WIDTHxHEIGHT"),
        ("ball.mp4", {"--name": "x", "--caption": " "}, "--caption: must be a string that is not blank"),
        ("ball.mp4", {"--name": "x", "--edit": ""}, "--edit: the prompt is empty"),
        ("ball.mp4", {"--name": "x", "--edit": "a\x07"}, "--edit: prompt: 'a\\x07' is not a string without control"),
        ("🎈.mp4", {}, "cannot make a clip name from this; choose one (--name)"),
    ],
)
def test_add_refuses_mistakes_and_changes_nothing(
    tav: Tav, new: Path, tmp_path: Path, video: str, options: dict[str, object], error: str
) -> None:
    for name in ("ball.mp4", "🎈.mp4"):
        shutil.copy(new / "data/ball.mp4", tmp_path / name)
    (tmp_path / "text.mp4").write_text("no video\n" * 99)
    os.mkfifo(tmp_path / "pipe.mp4")
    before = contents(new)
    path = video if "/" in video else f"{tmp_path}/{video}"
    ended = tav("add", path, *(word for pair in ({"--caption": "a ball"} | options).items() for word in pair))
    assert ended.code == 2 and error in ended.error.replace(f"{new}/", "")
    assert contents(new) == before


def test_add_refuses_a_prompt_that_is_given_twice(tav: Tav, new: Path) -> None:
    before = contents(new)
    arguments = ("add", "data/ball.mp4", "--caption", "a ball", "--name", "b")
    ended = tav(*arguments, "--edit", "a cat", "--edit", "a blue ball", "--edit", " a blue ball")
    assert (ended.code, ended.error) == (
        2,
        "error: --edit: 'a blue ball' is given more than once; give each prompt once\n",
    )
    assert contents(new) == before


def test_add_all_frames(tav: Tav, new: Path) -> None:
    assert "uses 24 frames" in tav("add", new / "data/ball.mp4", "--caption", "a", "--name", "x", "--frames", "all").out
    assert read_yaml(new / "params.yaml")["clips"]["x"]["decode"] == {"frames": "all"}


@pytest.mark.parametrize("moment", ["probe", "write"])
@pytest.mark.parametrize(("error", "code"), [(OSError(28, "No space left on device"), 1), (KeyboardInterrupt(), 130)])
def test_add_does_all_or_nothing(
    tav: Tav, new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, error: BaseException, code: int
) -> None:
    def fails(*_: object) -> None:
        raise error

    shutil.copy(new / "data/ball.mp4", tmp_path / "kite.mp4")
    before = contents(new)
    monkeypatch.setattr(importing, {"probe": "decoded_frames", "write": "write_text"}[moment], fails)
    assert tav("add", tmp_path / "kite.mp4", "--caption", "a kite").code == code
    assert contents(new) == before
    monkeypatch.undo()
    monkeypatch.chdir(new)
    assert tav("add", tmp_path / "kite.mp4", "--caption", "a kite").code == 0


def test_what_the_user_changes_while_a_video_is_read_stays(
    tav: Tav, new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importing.decoded_frames

    def slow(*arguments: Any) -> Any:
        change(new / "params.yaml", "seed: 33", "seed: 34")
        return real(*arguments)

    shutil.copy(new / "data/ball.mp4", tmp_path / "kite.mp4")
    monkeypatch.setattr(importing, "decoded_frames", slow)
    assert tav("add", tmp_path / "kite.mp4", "--caption", "a kite").code == 0
    params = read_yaml(new / "params.yaml")
    assert params["seed"] == 34 and "kite" in params["clips"]
