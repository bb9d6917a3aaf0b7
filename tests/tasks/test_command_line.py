"""Mistakes of a user at the command line: one clear line, exit status 2, no traceback, nothing written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.__main__ import main
from tasks.clip_stages import ClipStages
from tests.support.projects import QUICK, change_params, fresh_clone, run

ErrorOf = Callable[..., str]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = fresh_clone(tmp_path_factory.mktemp("project"))
    change_params(project, QUICK)
    return project


@pytest.fixture
def project(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "project"))


@pytest.fixture
def error_of(project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> ErrorOf:
    """The one line that a stage which must fail leaves on the terminal; the stage runs in this process."""
    monkeypatch.chdir(project)

    def error_of(stage: str, *arguments: str) -> str:
        capfd.readouterr()
        status = main([stage, *arguments])
        return only_error(project, status, "".join(capfd.readouterr()))

    return error_of


def only_error(project: Path, status: int, said: str) -> str:
    lines = [line for line in said.splitlines() if line]
    assert status == 2, said
    assert len(lines) == 1 and lines[0].startswith("error: "), said
    assert not (project / "results").exists()
    return lines[0]


def replace_in_params(project: Path, old: str, new: str) -> None:
    path = project / "params.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_missing_clip_file(project: Path) -> None:
    """By the command itself."""
    (project / "data/ball.mp4").unlink()
    done = run(project, "python", "-m", "tasks", "decode", check=False)
    assert "data/ball.mp4: no such file" in only_error(project, done.returncode, done.stdout)


def test_a_clip_that_is_not_in_params(project: Path, error_of: ErrorOf) -> None:
    assert "no clip named 'cat'; there are: ball" in error_of("decode", "--clip", "cat")


def test_a_text_file_named_mp4(project: Path, error_of: ErrorOf) -> None:
    (project / "data/ball.mp4").write_text("this is no video\n" * 50)
    assert "ball.mp4: not a video that can be read" in error_of("decode")


def test_a_truncated_video(project: Path, error_of: ErrorOf) -> None:
    video = project / "data/ball.mp4"
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 3])
    assert "ball.mp4" in error_of("decode")


def test_a_clip_shorter_than_asked(project: Path, error_of: ErrorOf) -> None:
    change_params(project, {"decode": {"frames": 99}})
    message = error_of("decode")
    assert "has 24 frames" in message and "99 are needed" in message


def test_a_video_outside_the_project(project: Path, error_of: ErrorOf) -> None:
    change_params(
        project, {}, {"ball": {"video": "../x.mp4", "caption": "a", "prompts": "data/ball.csv", "decode": {}}}
    )
    assert "'../x.mp4'" in error_of("decode")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows"),
        ("prompt\n", "no rows"),
        ("prompt,steps\na cat,abc\n", "line 2: steps: 'abc'"),
        ("prompt,guidance_scale\na cat,7\na dog,nan\n", "line 3: guidance_scale: 'nan'"),
        ("prompt,colour\na cat,red\n", "colour"),
        ('prompt\n""\n"   "\n', "no rows"),
        ("name,prompt\nx,\n", "line 2"),
        ("name,prompt\nx,a\nX,b\n", "line 3"),
        ("name,prompt\n../x,a\n", "line 2: name"),
    ],
)
def test_prompt_files_that_are_wrong(project: Path, error_of: ErrorOf, content: str, message: str) -> None:
    (project / "data/ball.csv").write_text(content)
    assert message in error_of("edit")


@pytest.mark.slow
def test_a_missing_base_model(project: Path) -> None:
    change_params(project, {"base_model": "models/none"})
    frames = project / "results/ball/frames"
    done = run(project, "python", "-m", "tasks", "decode")
    assert done.returncode == 0 and (frames / "frames.safetensors").exists()
    done = run(project, "python", "-m", "tasks", "encode", check=False)
    assert done.returncode == 2
    assert "error: " in done.stdout and "models/none" in done.stdout and "Traceback" not in done.stdout


@pytest.mark.parametrize(
    ("old", "new", "messages"),
    [
        ("  steps: 4", "  stepz: 4", ["tune.stepz", "steps"]),
        ("  steps: 4", "  steps: -1", ["tune.steps", "-1"]),
        ("- first\n", "- frist\n", ["attention.spatial", "frist", "former"]),
        ("seed: 33", "seed: many", ["seed", "many"]),
        ("seed: 33", "seed: [33", ["line"]),
    ],
)
def test_parameters_that_are_wrong(project: Path, error_of: ErrorOf, old: str, new: str, messages: list[str]) -> None:
    replace_in_params(project, old, new)
    message = error_of("decode")
    assert "params.yaml" in message
    for part in messages:
        assert part in message


def test_help_needs_no_heavy_import(project: Path) -> None:
    script = "import sys, tasks.__main__\ntry: tasks.__main__.main(['--help'])\nexcept SystemExit: pass\n"
    heavy = "print(sorted({'torch', 'diffusers', 'transformers', 'mlflow', 'dvc', 'pandas', 'cv2'} & set(sys.modules)))"
    assert run(project, "python", "-c", script + heavy).stdout.splitlines()[-1] == "[]"


def test_the_stages_that_read_texts_name_words_that_the_model_does_not_know(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []
    monkeypatch.setattr(ClipStages, "run", lambda stages, stage: ran.append(stage))
    monkeypatch.chdir(project)
    (project / "data/ball.csv").write_text("prompt\na red zebra\n")
    for stage in ("decode", "encode", "edit"):
        assert main([stage, "--clip", "ball"]) == 0
    assert ran == ["decode", "encode", "edit"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith('warning: toyworld does not know "zebra"; it') for line in lines)
    (project / "data/ball.csv").write_text("prompts\n")  # The stage itself reports it.
    assert main(["encode", "--clip", "ball"]) == 0 and capsys.readouterr().err == ""
