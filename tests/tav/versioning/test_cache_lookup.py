"""Rendered rows are found in DVC's cache after DVC has deleted them from the results."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from tav.versioning.cache_lookup import previous_output
from tests.support.dvc_project import ROOT, commit_all, dvc, environment, git, make_project

EDITS = "results/ball/edits"
NAMES = {"a.mp4", "b/c.json"}

# At the start of the stage `edit`: what the stage can find of the edits that DVC has just deleted.
LOOK = f"""
import sys
sys.path.append({str(ROOT)!r})
from tav.versioning.cache_lookup import previous_output
if stage == "edit":
    found = previous_output(Path.cwd(), {EDITS!r})
    files = {{name: file.read_text() for name, file in found.items()}}
    Path("found.json").write_text(json.dumps({{"gone": not Path({EDITS!r}).exists(), "files": files}}))
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(folder).items():
            patch.setenv(name, value)
        root = make_project(folder / "project")
        dvc(root, "repro", "-q", "edit@ball")
        commit_all(root)
        yield root


@pytest.fixture
def project(template, tmp_path):
    return shutil.copytree(template, tmp_path / "project")


def found(root):
    return {name: path.read_text() for name, path in previous_output(root, EDITS).items()}


@pytest.fixture(scope="module")
def expected(template):
    return {name: (template / EDITS / name).read_text() for name in NAMES}


def test_found_after_the_output_is_gone(project, expected):
    shutil.rmtree(project / "results")
    assert found(project) == expected


def test_found_by_the_stage_that_dvc_runs_after_it_deleted_the_output(project, expected):
    main = project / "tasks/__main__.py"
    main.write_text(main.read_text().replace("params = yaml", f"{LOOK}\nparams = yaml", 1))
    params = project / "params.yaml"
    params.write_text(params.read_text().replace("guidance_scale: 7.5", "guidance_scale: 12.5"))
    dvc(project, "repro", "-q", "edit@ball")
    assert json.loads((project / "found.json").read_text()) == {"gone": True, "files": expected}
    assert found(project) != expected  # by now the lock file has the new ones


def test_found_in_a_clone_once_it_has_fetched(project, expected, tmp_path):
    dvc(project, "remote", "add", "-q", "-d", "store", str(tmp_path / "store"))
    commit_all(project)
    dvc(project, "push", "-q")
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(project), str(clone))
    assert found(clone) == {}
    dvc(clone, "fetch", "-q")
    assert not (clone / EDITS).exists()
    assert found(clone) == expected


def test_files_that_the_cache_has_lost_are_left_out(project, expected):
    previous_output(project, EDITS)["a.mp4"].unlink()
    assert found(project) == {"b/c.json": expected["b/c.json"]}


@pytest.mark.parametrize("level", ["--project", "--local", "--global"])
def test_heeds_where_the_cache_is(project, expected, tmp_path, monkeypatch, level):
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path / "global"))
    shutil.move(project / ".dvc/cache", tmp_path / "elsewhere")
    assert found(project) == {}
    dvc(project, "config", level, "cache.dir", str(tmp_path / "elsewhere"))
    assert found(project) == expected


def test_other_settings_of_the_cache_leave_it_where_it_is(project, expected):
    dvc(project, "config", "cache.type", "copy")
    assert found(project) == expected


def test_nothing_where_there_is_nothing(project, tmp_path):
    assert previous_output(tmp_path, EDITS) == {}
    assert previous_output(project, "results/ball") == {}
    assert previous_output(project, "results/ball/tuned/loss.csv") == {}  # a file, not a folder
    assert previous_output(project, "results/man-skiing_2/edits") == {}


@pytest.mark.parametrize("text", ["", "stages: [", "stages: 3", "stages: {edit@ball: {outs: [3]}}", "\0"])
def test_nothing_of_a_damaged_lock_file(project, text):
    (project / "dvc.lock").write_text(text)
    assert found(project) == {}


def test_nothing_of_a_damaged_cache(project):
    (folder,) = [path for path in project.glob(".dvc/cache/files/md5/*/*.dir") if "c.json" in path.read_text()]
    folder.chmod(0o644)
    folder.write_text("[")
    assert found(project) == {}


def test_quick_because_dvc_stays_out(project):
    code = f"""
import sys, time
from pathlib import Path
from tav.versioning.cache_lookup import previous_output
begin = time.perf_counter()
files = previous_output(Path({str(project)!r}), {EDITS!r})
print(sorted(files), "dvc" in sys.modules, time.perf_counter() - begin < 0.5)
"""
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.strip() == f"{sorted(NAMES)} False True"
