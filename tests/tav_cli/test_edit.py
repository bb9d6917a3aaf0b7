"""`tav edit`: prompts are rendered right away, and not again."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tasks.clip_stages import ClipStages
from tasks.rows import RowBatch
from tav.config.stages import STAGES
from tav.versioning.dvc_pipeline import DvcPipeline
from tav_model.errors import FullDiskError
from tav_model.files import read_json
from tests.support.projects import change_params
from tests.support.tav_command import Tav, contents


def test_edit_renders_at_once_and_finds_what_was_rendered(
    tav: Tav, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = tav("edit", "ball", "a green ball", "a green ball", "a blue ball", "--json")
    assert ended.code == 0, ended.err
    green, blue = sorted(json.loads(ended.out)["edits"], key=lambda edit: edit["prompt"], reverse=True)
    assert green == {
        "prompt": "a green ball",
        "video": "results/ball/quick/a-green-ball.mp4",
        "preview": "results/ball/quick/a-green-ball.webp",
        "record": "results/ball/quick/a-green-ball.json",
        "rendered": True,
        "error": None,
    }
    assert not blue["rendered"]  # A row of the CSV has these settings too.
    assert (done / blue["video"]).read_bytes() == (done / "results/ball/edits/blue.mp4").read_bytes()
    assert read_json(done / green["record"])["name"] == "a-green-ball"
    versions = DvcPipeline(done)
    assert all(versions.is_current(stage, "ball") for stage in STAGES)

    shutil.rmtree(done / ".tav/rows")
    monkeypatch.setattr(RowBatch, "render", lambda *_: pytest.fail("rendered again"))
    before = contents(done)
    assert tav("edit", "ball", " a green ball ", "a blue ball", "-q") == (
        0,
        "results/ball/quick/a-green-ball.mp4\nresults/ball/quick/a-blue-ball.mp4\n",
        "",
    )
    assert contents(done) == before


def test_edit_says_what_is_wrong_and_the_report_shows_it(
    tav: Tav, done: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    change_params(done, {"score": {"clip_model": "toyworld/scorer"}})
    before = (done / "results/ball/report.html").read_text()
    ended = tav("edit", "ball", "a green ball", "a green zebra on the moon")
    assert ended.code == 0
    (warning,) = [text for text in caplog.messages if "does not know" in text]
    assert warning.startswith('toyworld does not know "zebra" or "moon"; it knows a ball, cube, ')
    green, zebra = ended.err.splitlines()[-2:]
    assert re.match(r"(! )?a-green-ball: ", green)
    assert zebra.startswith('! a-green-zebra-on-the-moon: toyworld does not know "zebra" or "moon"')
    assert 'does not know "zebra" or "moon"' in (done / "logs/ball/quick.log").read_text()
    page = (done / "results/ball/report.html").read_text()
    assert "quick/" not in before and "2 quick edits" in page
    assert page.count("quick/a-green-zebra-on-the-moon") > 2 and "toyworld does not know &#34;zebra&#34;" in page

    monkeypatch.setattr("tav.reports.report.write_report", lambda *_: pytest.fail("written again"))
    tav("edit", "ball", "a green ball")
    scores = read_json(done / "results/ball/quick/scores/a-green-ball.json")
    assert set(scores["scores"]) >= {"textual_alignment", "alignment_gain", "frame_consistency", "warping_error"}


def test_edit_that_could_not_be_written_is_refused_before_it_is_rendered(
    tav: Tav, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RowBatch, "render", lambda *_: pytest.fail("rendered"))
    (done / "results/ball/quick").write_text("in the place of a folder")
    assert tav("edit", "ball", "a green ball").error == (
        "error: quick edits: the results of the clip ball cannot be written to results/ball/quick: Not a directory\n"
    )


def test_edit_with_other_settings_is_another_video_and_goes_into_the_csv(tav: Tav, done: Path) -> None:
    assert tav("edit", "ball", "a blue ball").out == "results/ball/quick/a-blue-ball.mp4\n"
    ended = tav("edit", "ball", "a blue ball", "--guidance-scale", 2, "--negative-prompt", "red", "--add")
    assert re.fullmatch(r"results/ball/quick/a-blue-ball-[0-9a-f]{8}\.mp4\n", ended.out)
    assert "data/ball.csv: added a-blue-ball" in ended.err
    assert (done / "data/ball.csv").read_text().splitlines() == [
        "name,prompt,guidance_scale,negative_prompt",
        "blue,a blue ball,,",
        "cube,a red cube,,",
        ",a blue ball,2.0,red",
    ]
    record = read_json(done / ended.out.strip().replace(".mp4", ".json"))
    assert (record["guidance_scale"], record["negative_prompt"], record["steps"]) == (2.0, "red", 1)
    # The pipeline has it already.
    assert ClipStages(done, "ball").rows_to_render() == []
    assert "has the prompts already" in tav("edit", "ball", "a blue ball", "--add").err


def test_edit_with_a_preset_and_a_mask(tav: Tav, done: Path) -> None:
    (done / "data/box.json").write_text('{"0": [0, 0, 32, 64]}')
    ended = tav("edit", "ball", "a blue ball", "--preset", "style", "--mask", "data/box.json", "--add")
    assert ended.code == 0, ended.err
    record = read_json(done / ended.out.strip().replace(".mp4", ".json"))
    assert (record["preset"], record["mask"]) == ("style", "data/box.json")
    assert (done / "results/ball/quick/scores/a-blue-ball.json").exists()
    assert "a blue ball,style,data/box.json" in (done / "data/ball.csv").read_text()
    # The pipeline has it already, and renders it again once the mask is another.
    assert ClipStages(done, "ball").rows_to_render() == []
    (done / "data/box.json").write_text('{"0": [0, 0, 16, 64]}')
    assert [row.prompt for row in ClipStages(done, "ball").rows_to_render()] == ["a blue ball"]


def test_edit_without_the_mask_of_its_preset_is_scored(tav: Tav, done: Path) -> None:
    ended = tav("edit", "ball", "a blue ball", "--preset", "attribute", "--mask", "none")
    assert ended.code == 0, ended.err
    video = done / ended.out.strip()
    record = read_json(video.with_suffix(".json"))
    assert (record["preset"], record["mask"]) == ("attribute", "none") and "mask_image" not in record
    assert (video.parent / "scores" / f"{video.stem}.json").exists()
    assert f"quick/{video.stem}" in (done / "results/ball/report.html").read_text()


def test_a_prompt_that_fails_fails_alone(tav: Tav, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = RowBatch.render

    def render(self: RowBatch, rows: Any, on_step: Any) -> Any:
        if any(row.prompt == "a cat" for row in rows):
            raise RuntimeError("no cats\nat all")
        return real(self, rows, on_step)

    monkeypatch.setattr(RowBatch, "render", render)
    before = (done / "data/ball.csv").read_bytes()
    ended = tav("edit", "ball", "a cat", "a red cube", "--add")
    assert ended.code == 1 and ended.out == "results/ball/quick/a-red-cube.mp4\n"
    assert ended.err.splitlines()[-1] == "error: 'a cat': no cats"
    assert (done / "data/ball.csv").read_bytes() == before
    assert "RuntimeError: no cats" in (done / "logs/ball/quick.log").read_text()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["cube", "a cat"], "cube: not tuned and inverted yet; tav run cube does it"),
        (["cat", "a cat"], "no clip named 'cat'; there are: ball, cube"),
        (["ball", " "], "the prompt is empty"),
        (["ball", "a", "--steps", "0"], "steps: '0' is not a whole number between 1 and 1000"),
        (["ball", "a", "--guidance-scale", "0"], "guidance_scale: '0' is not a number between 1 and 100"),
        (["ball", "a", "--guidance-scale", "high"], "guidance_scale: 'high' is not a number between 1 and 100"),
        (["ball", "a", "--guidance-scale", "nan"], "guidance_scale: 'nan' is not a number between 1 and 100"),
        (
            ["ball", "a", "--control-scale", "0.5"],
            "--control-scale: the clip ball has no control; set control in params.yaml",
        ),
        (["ball", "a", "--control-scale", "3"], "control_scale: '3' is not a number between 0 and 2"),
        (["ball", "a", "--preset", "jacket"], "preset: 'jacket' is not one of tune-a-video, layout, style, "),
        (
            ["ball", "a", "--mask", "../mask.png"],
            "mask: '../mask.png' is not words, difference, none, or a path inside the project",
        ),
        (["ball", "a", "--mask", "data/none.png"], "--mask: data/none.png: no such file"),
        (
            ["ball", "a", "--mask", "data/ball.csv"],
            "--mask: data/ball.csv: not a video that can be read (Invalid data found when processing input); "
            "a mask must be an image, a folder of images, a video or a JSON file of boxes\n",
        ),
        (["ball", "a", "--mask", "data/scenes/ball.json"], "--mask: data/scenes/ball.json: not keyed boxes; must be {"),
        (["ball", "a", "--seed", "-1"], "seed: '-1' is not a whole number"),
    ],
)
def test_edit_refuses_mistakes(tav: Tav, done: Path, arguments: list[str], error: str) -> None:
    before = contents(done)
    ended = tav("edit", *arguments)
    assert ended.code == 2 and error in ended.error
    assert contents(done) == before


def test_edit_refuses_a_missing_mask_of_the_parameters_unless_there_is_another(tav: Tav, done: Path) -> None:
    change_params(done, {"edit": {"mask": "data/none.png"}})
    ended = tav("edit", "ball", "a green ball")
    assert ended.code == 2 and "params.yaml: edit.mask: data/none.png: no such file" in ended.error
    assert tav("edit", "ball", "a green ball", "--mask", "none").code == 0


def test_edit_writes_through_no_link_out_of_the_project(tav: Tav, done: Path, tmp_path: Path) -> None:
    (done / "data/ball.csv").rename(tmp_path / "elsewhere.csv")
    (done / "data/ball.csv").symlink_to(tmp_path / "elsewhere.csv")
    before = (tmp_path / "elsewhere.csv").read_bytes()
    refused = tav("edit", "ball", "a cat", "--add").error
    assert "data/ball.csv is a link out of the project; only files inside it are written" in refused
    assert (tmp_path / "elsewhere.csv").read_bytes() == before and not (done / "results/ball/quick").exists()


def test_edit_waits_for_nobody(tav: Tav, done: Path) -> None:
    with ClipStages(done, "ball").session("decode"):
        assert f"is in use by process {os.getpid()} (stage decode)" in tav("edit", "ball", "a cat").error


def test_a_full_disk_ends_it_and_is_no_fault_of_a_prompt(tav: Tav, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: RowBatch, rows: Any, on_step: Any) -> Any:
        raise FullDiskError(errno.ENOSPC, "no room left on the disk", "edit.mp4")

    monkeypatch.setattr(RowBatch, "render", full)
    ended = tav("edit", "ball", "a cat", "a dog")
    assert ended.code == 1 and ended.out == ""
    assert ended.err.splitlines()[-1] == "error: edit.mp4: no room left on the disk"
