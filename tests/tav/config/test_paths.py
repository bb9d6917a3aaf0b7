"""Where files of a project are, and which paths and models the parameters may name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tav.config.paths import Project, project_path, resolve_model
from tav_model.errors import TavError
from toyworld import WEIGHTS


@pytest.mark.parametrize(
    "text", ["data/x.mp4", "x.csv", "a b/ü.csv", "data/..x", "data/x..", "./data/x", "data//x", "-x"]
)
def test_paths_in_the_project(tmp_path: Path, text: str) -> None:
    assert project_path(tmp_path, text, "here").is_relative_to(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            ".",
            "./",
            "..",
            "../x",
            "data/../x",
            "data/..",
            "/x",
            "//x",
            "~",
            "~/x",
            "~root/x",
            "a\\b",
            "..\\x",
        ),
        *("C:/x", "C:x", "a\0b", "a\nb", "a\x7f", "a\x85b", "a\u2028b", "a\ud800b", "data/" + "x" * 256, "ü" * 128),
    ],
)
def test_paths_out_of_the_project(tmp_path: Path, text: str) -> None:
    with pytest.raises(TavError, match=r"^here: .*must be a relative path inside the project") as caught:
        project_path(tmp_path, text, "here")
    assert str(caught.value).isprintable()


@given(text=st.text(max_size=20) | st.text("./\\~ a", max_size=12))
@settings(max_examples=200)
def test_no_text_leads_out(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    root = tmp_path_factory.getbasetemp() / "project"
    try:
        path = project_path(root, text, "here")
    except TavError:
        return
    assert Path(os.path.abspath(path)).is_relative_to(root) and Path(os.path.abspath(path)) != root
    assert not path.exists()  # and it can be asked for


def test_every_file_of_a_clip_has_a_place_of_its_own(tmp_path: Path) -> None:
    project = Project(tmp_path)
    places = (project.frames, project.latents, project.tuned, project.inverted, project.edits, project.scores)
    paths = [place(clip) for place in (*places, project.contact_sheet, project.report) for clip in ("ball", "car")]
    paths += [project.log(clip, stage) for clip in ("ball", "car") for stage in ("tune", "edit")] + [project.work]
    assert len(set(paths)) == len(paths)
    for path in paths:
        assert not any(path != other and path.is_relative_to(other) for other in paths)
    assert project.frames("ball") == tmp_path / "results/ball/frames"
    assert project.log("ball", "tune") == tmp_path / "logs/ball/tune.log"


def test_models_are_looked_for_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, first, second = tmp_path / "project", tmp_path / "first", tmp_path / "second"
    monkeypatch.setenv("TAV_MODELS", os.pathsep.join([str(first), "", str(second)]))
    name = "someone/diffusion-1.5"
    assert resolve_model(root, name) == name
    for folder in (second, first, root):
        (folder / name).mkdir(parents=True)
        assert resolve_model(root, name) == str(folder / name)
    monkeypatch.delenv("TAV_MODELS")
    assert resolve_model(tmp_path, name) == name


@pytest.mark.parametrize("name", ["toyland", "models/toyland", "a/b/c", "a/-b", "a b/c"])
def test_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("TAV_MODELS", str(tmp_path / "shared"))
    with pytest.raises(TavError) as caught:
        resolve_model(tmp_path / "project", name)
    assert str(tmp_path / "project" / name) in str(caught.value)
    assert str(tmp_path / "shared" / name) in str(caught.value)


def test_the_embedded_model_is_found_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TAV_MODELS", raising=False)
    (tmp_path / "toyworld").mkdir()  # The package of a clone is not the model.
    assert resolve_model(tmp_path, "toyworld") == str(WEIGHTS)
    assert resolve_model(tmp_path, "toyworld/scorer") == str(WEIGHTS / "scorer")
    with pytest.raises(TavError, match="no model 'toyworld/judge'"):
        resolve_model(tmp_path, "toyworld/judge")


def test_a_model_out_of_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAV_MODELS", str(tmp_path / "shared"))
    (tmp_path / "secret").mkdir()
    (tmp_path / "shared").mkdir()
    for name in ("../secret", str(tmp_path / "secret")):
        with pytest.raises(TavError, match="must be a relative path inside the project"):
            resolve_model(tmp_path / "project", name)
