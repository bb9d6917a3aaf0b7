"""CSVs, parameters and JSON from anywhere: read or refused in one line, and nothing is written out of the project."""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tasks.rows import RowBatch
from tav.config import load_params, write_overrides
from tav.config.prompts import read_prompts
from tav_model.errors import TavError
from tav_model.files import read_json, write_json
from tests.support.projects import ROOT

READERS: dict[str, Callable[[Path], Any]] = {"x.csv": read_prompts, "params.yaml": load_params, "x.json": read_json}


def refused(path: Path) -> str:
    with pytest.raises(TavError) as error:
        READERS[path.name](path)
    assert str(error.value).isprintable() and len(str(error.value)) < 600
    return str(error.value)


# Files that are none, or have no end


@pytest.mark.parametrize("name", READERS)
def test_pipes_and_devices_are_not_read(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    assert "is not a file" in refused(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    assert "is not a file" in refused(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(name)
    refused(tmp_path / name)


@pytest.mark.parametrize("name", READERS)
def test_no_more_is_read_than_such_a_file_has(tmp_path: Path, name: str) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(2**40)
    assert "too large; at most" in refused(tmp_path / name)


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5, "9" * 5000, '"\ud800', "\ufeff{}", "nul", ""])
def test_json_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_bytes(text.encode(errors="surrogatepass"))
    assert "not a JSON file" in refused(tmp_path / "x.json")


# YAML

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40)
)
SPATIAL = "  spatial: [first, former]"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("seed: 33\n", BOMB + "seed: 33\n"),
        ("seed: 33\n", BOMB + "seed: *a39\n"),
        (SPATIAL, "  spatial: &x [*x]"),
        ("seed: 33\n", "seed: &x {y: *x}\n"),
        ("seed: 33\n", "seed: !!python/object/apply:os.system ['touch exploded']\n"),
        ("seed: 33\n", "seed: !!python/name:os.system\n"),
        ("seed: 33\n", "seed: !custom 33\n"),
        ("seed: 33\n", "seed: .nan\n"),
        ("seed: 33\n", "seed: -1\n"),
        ("seed: 33\n", f"seed: {'9' * 5000}\n"),
        ("steps: 40", "steps: .inf"),
        ("learning_rate: 6.0e-3", "learning_rate: 1.0e+400"),
        ("caption: a red ball", 'caption: "a \\x1b[2J red ball"'),
        ("caption: a red ball", 'caption: "a \\0 red ball"'),
        ("caption: a red ball", 'caption: "a \\ud800 red ball"'),
        ("prompt: " + '""', 'prompt: "\\x07"'),
        ("video: data/ball.mp4", "video: ../ball.mp4"),
        ("video: data/ball.mp4", "video: /etc/passwd"),
        ("  ball:\n", "  ../ball:\n"),
        ("  ball:\n", "  BALL:\n"),
        ("  ball:\n", f"  {'b' * 300}:\n"),
        ("  ball:\n", "  ⚽:\n"),
    ],
)
def test_hostile_parameters_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "params.yaml").read_text()
    assert old in text
    (tmp_path / "params.yaml").write_text(text.replace(old, new, 1))
    assert refused(tmp_path / "params.yaml").startswith("params.yaml: ")
    assert os.listdir(tmp_path) == ["params.yaml"]


@pytest.mark.parametrize("codec", ["utf-16", "utf-32", "latin-1"])
def test_parameters_in_another_encoding_are_refused(tmp_path: Path, codec: str) -> None:
    text = (ROOT / "params.yaml").read_text().replace("a red ball", "ein Bällchen", 1)
    (tmp_path / "params.yaml").write_bytes(text.encode(codec))
    assert "not UTF-8" in refused(tmp_path / "params.yaml")


@pytest.mark.parametrize("change", [lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n")])
def test_marks_and_line_ends_of_other_editors_are_read(tmp_path: Path, change: Callable[[str], str]) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(change((ROOT / "params.yaml").read_text()).encode())
    assert load_params(path) == load_params(ROOT / "params.yaml")


# Nothing is written out of the project

HOSTILE = (
    *("../x", "../../x", "/etc/x", "x/../../y", ".", "..", "...", "~", "~root", "a/b", "a\\b", "C:\\x", "\\\\host\\x"),
    *(
        "con",
        "NUL.mp4",
        "x\0y",
        "x\ny",
        "x\x1b[2J",
        "x" * 300,
        "🎈",
        "ü",
        "Cat",
        "cat",
        "CAT",
        " ",
        "-rf",
        "$(x)",
        "%d",
    ),
)
names = st.sampled_from(HOSTILE) | st.text(max_size=20) | st.text("./\\~:ab\0", min_size=1, max_size=10)
numbers = st.sampled_from(["", "1", "-1", "nan", "inf", "1e999", "9" * 400, "0x1", "\uff11"]) | st.text(max_size=5)
rows = st.tuples(st.sampled_from(["a cat", "a dog", "../x"]) | names, names | st.just(""), numbers, numbers, numbers)


def tree(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}


class NoModel(RowBatch):
    """The edits of a CSV with a file of a few bytes for each video: names, folders and records are the real ones."""

    def _adopt_previous(self) -> None:
        pass

    def fill(self) -> None:
        for row in self.rows:
            folder = self.store / row.identity
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "edit.mp4").write_bytes(b"video")
            (folder / "edit.webp").write_bytes(b"preview")
            write_json(folder / "edit.json", {"name": row.name})


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("around") / "deep" / "project"
    for folder in ("results/ball/inverted", "results/ball/tuned", "base", "data"):
        (root / folder).mkdir(parents=True)
    write_json(root / "results/ball/tuned/tuned.json", {})
    (root / "results/ball/inverted/inverted.safetensors").touch()
    return root


def render(root: Path) -> int:
    """Read the project's CSV and leave its results folder; how many edits there are in it."""
    params = load_params(ROOT / "params.yaml")
    clip = root / "results" / "ball"
    batch = NoModel(
        read_prompts(root / "data/x.csv"),
        *(clip / "inverted", clip / "tuned", clip / "edits"),
        root=root,
        base=str(root / "base"),
        attention=params.attention,
        params=params.edit,
        seed=1,
        device="cpu",
        store=root / ".tav" / "rows" / "ball",
    )
    batch.fill()
    batch.publish({})
    return len(batch.rows)


def check_rows(root: Path, table: list[tuple[str, ...]]) -> None:
    stream = io.StringIO(newline="")
    csv.writer(stream).writerows([("prompt", "name", "seed", "steps", "guidance_scale"), *table])
    (root / "data/x.csv").write_bytes(stream.getvalue().encode(errors="surrogatepass"))
    around, edits = root.parents[1], root / "results/ball/edits"
    shutil.rmtree(edits, ignore_errors=True)
    before = tree(around)
    try:
        count = render(root)
    except TavError as error:
        assert str(error).isprintable()
        assert tree(around) == before
    else:
        assert len(list(edits.iterdir())) == 3 * count  # No two have the same name, and none is in another folder.
        outputs = (str(edits.parent), str(root / ".tav"))
        touched = {path for path, time in tree(around).items() if before.get(path) != time}
        assert all(path.startswith(outputs) for path in touched - {str(root)})


def checked_rows(count: int) -> Callable[[Path], None]:
    @settings(max_examples=count)
    @given(table=st.lists(rows, min_size=1, max_size=4))
    @example(table=[("a cat", "Cat", "", "", ""), ("a dog", "cat", "", "", "")])
    @example(table=[("../x", "", "", "", ""), ("../../etc/passwd", "", "", "", "")])
    def check(root: Path, table: list[tuple[str, ...]]) -> None:
        check_rows(root, table)

    return check


@pytest.mark.slow
@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=[pytest.mark.long, pytest.mark.timeout(3600)])])
def test_no_row_writes_out_of_the_results(project: Path, count: int) -> None:
    checked_rows(count)(root=project)


@pytest.mark.parametrize("name", HOSTILE)
def test_no_hostile_name_writes_out_of_the_results(project: Path, name: str) -> None:
    check_rows(project, [("a cat", name, "", "", "")])
    check_rows(project, [(name, "", "", "", "")])


keys = st.sampled_from(
    [
        *("seed", "tune.steps", "edit.guidance_scale", "clips.ball.video", "clips.ball.prompts", "clips.ball.caption"),
        *(
            "clips.../x.video",
            "base_model",
            "attention.spatial",
            "tune",
            "clips",
            "tracking.uri",
            "",
            ".",
            "clips.ball",
        ),
    ]
) | st.text(max_size=12)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=5,
)


def checked_overrides(count: int) -> Callable[[Path], None]:
    @settings(max_examples=count)
    @given(overrides=st.dictionaries(keys, json_values, min_size=1, max_size=3))
    def check(root: Path, overrides: dict[str, Any]) -> None:
        path = root / "params.yaml"
        shutil.copyfile(ROOT / "params.yaml", path)
        before = tree(root.parents[1])
        try:
            write_overrides(path, overrides)
        except TavError as error:
            assert str(error).isprintable()
            assert tree(root.parents[1]) == before
        else:
            load_params(path)
            changed = {name for name, time in tree(root.parents[1]).items() if before.get(name) != time}
            assert changed <= {str(path), str(root)}

    return check


@pytest.mark.parametrize("count", [25, pytest.param(1000, marks=[pytest.mark.long, pytest.mark.timeout(3600)])])
def test_no_override_writes_anything_but_the_parameters(project: Path, count: int) -> None:
    checked_overrides(count)(root=project)


# On the command line


@pytest.mark.parametrize("clip", ["../ball", "/etc/passwd", "ball\n", "\x1b[2J", "x" * 300, "", "🎈", "ball/../ball"])
def test_clips_of_the_command_line(tmp_path: Path, clip: str, capsys: pytest.CaptureFixture[str]) -> None:
    from tasks.__main__ import main

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        shutil.copyfile(ROOT / "params.yaml", tmp_path / "params.yaml")
        assert main(["decode", "--clip", clip or "."]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and line.isprintable()
    assert os.listdir(tmp_path) == ["params.yaml"]
