"""Changes to params.yaml: comments, order and line ends stay; what is refused leaves the file unchanged."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from tav.config import (
    add_clip,
    complete_keys,
    load_params,
    no_own_settings,
    write_overrides,
)
from tav_model.errors import TavError
from tests.support.params import SHORT

ROOT = Path(__file__).resolve().parents[3]


BLOCK = (
    SHORT.partition("clips:")[0]
    + """\
clips:  # all of them
  # the first
  ball:
    video: data/ball.mp4
    caption: a ball    # that bounces
    prompts: data/ball.csv
    decode: {}

# what follows
"""
)


CAT = {"video": "data/cat.mp4", "caption": "a cat", "prompts": "data/cat.csv", "decode": {"frames": 4}}


CAT_LINES = """\
  cat:
    video: data/cat.mp4
    caption: a cat
    prompts: data/cat.csv
    decode: {frames: 4}
"""


texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20).filter(str.strip)


changes = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "attention.spatial": st.lists(st.sampled_from(["first", "former", "self", "all"]), min_size=1, max_size=6),
        "tune.learning_rate": st.floats(0, 1, exclude_min=True),
        "tune.steps": st.integers(1, 100000),
        "decode.end": st.none() | st.integers(1, 10**6),
        "invert.prompt": st.just("") | texts,
        "clips.ball.caption": texts
        | st.sampled_from(["yes", "no", "null", "~", "12:30", ":0", "0o7", "1_000", "3e-5", "- a"]),
        "clips.ball.decode.start": st.integers(0, 1000),
        "runtime.gradient_checkpointing": st.booleans(),
    },
)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"tune.stepz": 1}, "override tune.stepz: unknown key; did you mean steps? (allowed: steps, "),
        ({"tun.steps": 1}, "override tun.steps: unknown key; did you mean tune? (allowed: base_model, seed, "),
        ({"steps": 1}, "override steps: unknown key; did you mean tune.steps or invert.steps or edit.steps?"),
        ({"zebra": 1}, "override zebra: unknown key (allowed: base_model, seed, "),
        ({"seed.first": 1}, "override seed.first: unknown key"),
        ({"attention.spatial.0": "self"}, "override attention.spatial.0: unknown key"),
        ({"": 1}, "override '': unknown key"),
        ({"a\nb": 1}, "override 'a\\nb': unknown key"),
        ({"clips.cat.prompts": "data/x.csv"}, "override clips.cat.prompts: no clip named 'cat'; there are: ball, car"),
        ({"clips.ball.prompt": "data/x.csv"}, "override clips.ball.prompt: unknown key; did you mean prompts?"),
        ({"tune.steps": "many"}, "tune.steps: 'many' is not allowed: must be a whole number between 0 and 100000"),
        ({"tune.steps": "["}, "tune.steps: '[' is not allowed: must be a whole number between 0 and 100000"),
        (
            {"tune.steps": 10, "edit.steps": 0},
            "edit.steps: 0 is not allowed: must be a whole number between 1 and 1000",
        ),
        ({"runtime.edit_batch": True}, "runtime.edit_batch: True is not allowed"),
    ],
)
def test_refused_overrides_leave_the_file(path: Path, overrides: dict[str, Any], message: str) -> None:
    text = SHORT.replace("score: {}", "score: {}\nruntime: {edit_batch: 1}")
    path.write_text(text)
    with pytest.raises(TavError) as caught:
        write_overrides(path, overrides)
    assert message in str(caught.value) and str(caught.value).isprintable()
    assert path.read_text() == text and [file.name for file in path.parent.iterdir()] == ["params.yaml"]


def test_an_override_keeps_everything_else_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    before = (ROOT / "params.yaml").read_text().splitlines()
    path.write_text("\n".join([*before, ""]))
    write_overrides(path, {"tune.steps": 7, "attention.spatial": ["self", "all"], "score.clip_model": None})
    after = path.read_text().splitlines()
    assert len(after) == len(before)
    changed = {old: new for old, new in zip(before, after, strict=True) if old != new}
    assert sorted(new.partition("#")[0].strip() for new in changed.values()) == [
        "clip_model: null",
        "spatial: [self, all]",
        "steps: 7",
    ]
    for old, new in changed.items():
        assert old.partition("#")[2] == new.partition("#")[2]


@pytest.mark.parametrize("text", [SHORT, (ROOT / "params.yaml").read_text(), SHORT.replace("\n", "\r\n")])
def test_values_that_are_there_already_leave_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(text.encode())
    os.utime(path, (1, 1))
    params = load_params(path)
    assert write_overrides(path, {"seed": 33, "decode.frames": 8, "clips.ball.prompts": "data/ball.csv"}) == params
    assert write_overrides(path, {}) == params
    assert path.read_bytes() == text.encode() and path.stat().st_mtime == 1


def test_an_override_replaces_a_list_that_dvc_has_put_on_lines_of_its_own(path: Path) -> None:
    """As `dvc exp run -S attention.spatial=[first]` writes it, below the comment of its key."""
    content = YAML(typ="safe").load(path.read_text())
    content["attention"] = {"spatial": ["first"], "temporal": True}
    stream = io.StringIO()
    YAML().dump(content, stream)
    path.write_text(stream.getvalue().replace("  spatial:\n", "  spatial:    # frames to attend to\n"))
    assert "# frames to attend to\n  - first\n" in path.read_text()
    write_overrides(path, {"attention.spatial": ["first", "former"]})
    assert load_params(path).attention.spatial == ["first", "former"]
    assert "# frames to attend to" in path.read_text()


def test_an_override_leaves_other_writers_of_yaml_alone(path: Path) -> None:
    def written() -> str:
        stream = io.StringIO()
        YAML().dump({"end": None}, stream)
        return stream.getvalue()

    before = written()
    write_overrides(path, {"decode.end": None})
    assert written() == before


def test_an_override_can_repair_a_file(path: Path) -> None:
    path.write_text(SHORT.replace("tune: {}", "tune: {steps: 0}"))
    assert write_overrides(path, {"tune.steps": 5}) == load_params(path)
    assert path.read_text() == SHORT.replace("tune: {}", "tune: {steps: 5}")


def test_line_ends_and_links_stay(tmp_path: Path) -> None:
    file, link = tmp_path / "real.yaml", tmp_path / "params.yaml"
    file.write_bytes(SHORT.replace("\n", "\r\n").encode())
    link.symlink_to(file.name)
    write_overrides(link, {"seed": 34})
    assert link.is_symlink() and file.read_bytes() == SHORT.replace("33", "34").replace("\n", "\r\n").encode()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (BLOCK, "\n# what follows\n"),
        (BLOCK + "runtime: {}\n", "\n# what follows\nruntime: {}\n"),
        (BLOCK.partition("\n\n")[0], ""),
        (BLOCK.partition("\n\n")[0] + "\n  # car: later\n\n", "\n"),
        (BLOCK.partition("\n\n")[0] + "\n...\n", "...\n"),
    ],
)
def test_a_clip_more_is_lines_more(path: Path, before: str, after: str) -> None:
    path.write_text(before)
    text, params = add_clip(path, "cat", CAT)
    kept = before.removesuffix(after)
    assert text == kept + ("" if kept.endswith("\n") else "\n") + CAT_LINES + after
    assert path.read_text() == before
    path.write_text(text)
    assert load_params(path) == params and params.for_clip("cat").decode.frames == 4
    assert list(params.clips) == ["ball", "cat"]


def test_a_clip_more_where_clips_are_in_braces_or_lines_end_otherwise(path: Path) -> None:
    braces = SHORT.partition("clips:")[0] + "clips: {ball: {video: a, caption: a, prompts: a, decode: {}}}  # all\n"
    path.write_text(braces)
    text, params = add_clip(path, "cat", CAT)
    path.write_text(text)
    assert load_params(path) == params and "# a comment" in text and "# all" in text
    path.write_bytes(BLOCK.replace("\n", "\r\n").encode())
    text, _ = add_clip(path, "cat", CAT)
    assert text.count("\r\n") == text.count("\n") == BLOCK.count("\n") + 5


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("ball", {}, "clips: 'ball' already exists"),
        ("Cat", {}, "clips.Cat: the clip's name must be"),
        ("cat", {"video": "/etc/passwd"}, "clips.cat.video: '/etc/passwd' is not allowed"),
        ("cat", {"decode": {"frames": 0}}, "clips.cat.decode.frames: 0 is not allowed"),
        ("cat", {"decode": {"frame": 1}}, "clips.cat.decode.frame: unknown key; did you mean frames?"),
        ("cat", {"caption": " "}, "clips.cat.caption: ' ' is not allowed"),
    ],
)
def test_clips_that_are_refused(path: Path, name: str, change: dict[str, Any], message: str) -> None:
    path.write_text(BLOCK)
    with pytest.raises(TavError) as caught:
        add_clip(path, name, CAT | change)
    assert message in str(caught.value) and str(caught.value).isprintable()


@given(
    caption=texts
    | st.sampled_from(["yes", "null", "~", "12:30", ":0", "- a", "# a", "a: b", "'", '"', "{a}", "|", "a #b"])
)
@settings(max_examples=60)
def test_any_caption_of_a_new_clip_is_read_back(scratch: Path, caption: str) -> None:
    in_braces = SHORT.partition("clips:")[0] + "clips: {ball: {video: a.mp4, caption: a, prompts: a.csv, decode: {}}}\n"
    for before, start, end in (
        (BLOCK, BLOCK.partition("\n\n")[0], "# what follows\n"),
        (in_braces, in_braces[:-2], "}\n"),
    ):
        scratch.write_text(before)
        text, params = add_clip(scratch, "cat", CAT | {"caption": caption})
        scratch.write_text(text)
        assert load_params(scratch) == params and params.clip("cat").caption == caption
        assert text.startswith(start) and text.endswith(end)


@pytest.mark.parametrize("text", [SHORT, BLOCK, BLOCK.replace("\n", "\r\n")])
def test_clips_of_earlier_versions_are_completed(path: Path, text: str) -> None:
    path.write_bytes(text.encode())
    before = load_params(path)
    complete_keys(path)
    completed = path.read_bytes().decode()
    content = YAML(typ="safe", pure=True).load(completed)
    assert content["control"] == [] and content["window"] == {"context_length": None}
    assert all(no_own_settings().keys() <= clip.keys() for clip in content["clips"].values())
    assert load_params(path) == before
    for line in text.splitlines():
        assert line.partition(" decode")[0] in completed
    assert ("\r\n" in completed) == ("\r\n" in text) and completed.count("\r") in (0, completed.count("\n"))
    complete_keys(path)
    assert path.read_bytes().decode() == completed
    path.write_text("clips: [")
    with pytest.raises(TavError, match=r"params\.yaml"):
        complete_keys(path)
    assert path.read_text() == "clips: ["


@given(overrides=changes)
@settings(max_examples=60)
def test_what_is_written_is_what_was_asked_for(scratch: Path, overrides: dict[str, Any]) -> None:
    scratch.write_text(SHORT)
    asked = load_params(scratch, overrides)
    assert write_overrides(scratch, overrides) == asked == load_params(scratch)
    for key, value in overrides.items():
        place: Any = asked
        for part in key.split("."):
            place = place[part] if isinstance(place, dict) else getattr(place, part)
        assert place == value and type(place) is type(value)
    written = scratch.read_bytes()
    assert b"models/small  # a comment" in written
    write_overrides(scratch, overrides)
    assert scratch.read_bytes() == written
