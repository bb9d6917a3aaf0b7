"""Small projects to run the command `tav` in: one in which nothing has run, and one that `tav run` has brought up to date."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows import temporary_server
from tav_cli import main as command
from tests.support.dvc_project import commit_all, git
from tests.support.dvc_project import environment as dvc_environment
from tests.support.projects import ROOT, change_params
from tests.support.tav_command import Ended, Tav, start_tav

QUICK: dict[str, Any] = {
    "decode": {"frames": 2, "width": 64, "height": 64},
    "tune": {"steps": 2},
    "invert": {"steps": 1},
    "edit": {"steps": 1},
    "score": {"clip_model": None},
    "runtime": {"checkpoint_every": 1, "device": "cpu"},
    "tracking": {"uri": None},
}
CLIPS = {
    name: {"video": f"data/{name}.mp4", "caption": "a red ball", "prompts": f"data/{name}.csv", "decode": {}}
    for name in ("ball", "cube")
}
PROJECT_FILES = ("params.yaml", "dvc.yaml", "prefect.toml", "constraints.txt", ".gitignore", ".dvcignore")
PROJECT_FILES += (".dvc/config", ".dvc/.gitignore")


@pytest.fixture(scope="package")
def isolated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that DVC and git keep to, instead of the user's configuration."""
    folder = tmp_path_factory.mktemp("isolated")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in dvc_environment(folder).items():
            patch.setenv(name, value)
        yield folder


@pytest.fixture(scope="package")
def fresh(isolated: Path) -> Path:
    """A project in which nothing has run, without the code, which is installed; the video of `cube` is broken."""
    project = isolated / "fresh"
    shutil.copytree(ROOT / "data", project / "data")
    for name in PROJECT_FILES:
        (project / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, project / name)
    change_params(project, QUICK, CLIPS)
    (project / "data/ball.csv").write_text("name,prompt\nblue,a blue ball\ncube,a red cube\n")
    (project / "data/cube.mp4").write_text("no video")
    git(project, "init", "-q")
    commit_all(project)
    return project


@pytest.fixture(scope="package")
def ran(fresh: Path, isolated: Path) -> tuple[Path, Ended]:
    """A project in which `tav run --json` has run both clips, and what it printed."""
    project = Path(shutil.copytree(fresh, isolated / "ran"))
    with start_tav(project, isolated, "run", "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = process.communicate(timeout=300)
    return project, Ended(process.returncode, out, err)


@pytest.fixture
def tav(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tav:
    """`tav` in this process and the folder where the test is."""
    for name, value in {"TAV_QUIET": "0", "NO_COLOR": "1", "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, value)
    for name in ("PREFECT_API_URL", "TAV_MLFLOW_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(temporary_server, "start_temporary_server", lambda log: pytest.fail("a server was started"))

    def call(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["tav", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            command.main()
        return Ended(ended.value.code, *capsys.readouterr())

    return call


@pytest.fixture
def new(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a copy of `fresh`, to be changed."""
    root = Path(shutil.copytree(fresh, tmp_path / "project"))
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def done(ran: tuple[Path, Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a copy of the project of `ran`, to be changed."""
    root = Path(shutil.copytree(ran[0], tmp_path / "project"))
    monkeypatch.chdir(root)
    return root
