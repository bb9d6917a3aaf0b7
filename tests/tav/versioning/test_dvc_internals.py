"""DVC's internals are as `tav.versioning.dvc_internals` uses them; on another DVC, each test names what has changed."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import logging
import tomllib
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tav.versioning.dvc_internals import DvcError, configured_cache_folder, import_dvc, locked_repo
from tests.support.dvc_project import ROOT, environment, make_project

VERSION = importlib.metadata.version("dvc")
SELF = object()
# Every call of an internal, with the number of positional arguments (`self` included) and the names of the others.
CALLS: dict[str, tuple[int, list[str]]] = {
    "dvc.repo:Repo": (1, []),
    "dvc.repo:lock_repo": (1, []),
    "dvc.repo:Repo.push": (1, ["targets"]),
    "dvc.repo.scm_context:SCMContext.__call__": (1, ["quiet"]),
    "dvc.repo.scm_context:SCMContext.track_file": (2, []),
    "dvc.dvcfile:ProjectFile": (2, []),
    "dvc.stage:PipelineStage.changed": (1, []),
    "dvc.stage:PipelineStage.changed_stage": (1, []),
    "dvc.stage:PipelineStage.status": (1, []),
    "dvc.stage:PipelineStage.deps_cached": (1, []),
    "dvc.stage:PipelineStage.save_deps": (1, []),
    "dvc.stage:PipelineStage.save": (1, ["run_cache"]),
    "dvc.stage:PipelineStage.commit": (1, []),
    "dvc.stage:PipelineStage.remove_outs": (1, []),
    "dvc.output:Output.clear": (1, []),
    "dvc.output:Output.status": (1, []),
    "dvc.output:Output.save": (1, []),
    "dvc.output:Output.commit": (1, []),
    "dvc.dependency:Dependency.status": (1, []),
    "dvc.dependency:Dependency.save": (1, []),
    "dvc.dependency:ParamsDependency.fill_values": (2, []),
    "dvc.dependency:ParamsDependency.read_params": (1, []),
    "dvc.stage.cache:StageCache.restore": (2, ["dry"]),
    "dvc.stage.cache:StageCache.save": (2, []),
    "dvc.stage.serialize:to_lockfile": (1, []),
    "dvc.utils.serialize:dump_yaml": (2, []),
    "dvc.utils.serialize:parse_yaml_for_update": (2, []),
    "dvc.lock:make_lock": (1, ["tmp_dir", "hardlink_lock"]),
    "dvc.config:Config": (1, []),
}
EXCEPTIONS = ["dvc.exceptions:DvcException", "dvc.lock:LockError", "dvc.stage.cache:RunCacheNotFoundError"]
# Attributes of live objects, from the fixture `live`.
ATTRIBUTES = [
    *(f"repo.{name}" for name in ("root_dir", "tmp_dir", "config", "stage_cache", "scm_context", "cache.local.path")),
    *(f"project.{name}" for name in ("stages", "contents", "lockfile_contents")),
    *(f"stage.{name}" for name in ("cmd", "deps", "outs", "name", "addressing", "dvcfile.stages", "repo")),
    *(f"output.{name}" for name in ("hash_info", "meta", "def_path", "fs_path", "exists")),
    *(f"dependency.{name}" for name in ("hash_info.value", "def_path", "fs_path", "exists")),
    *(f"parameters.{name}" for name in ("hash_info.value", "def_path", "params")),
]


def look_up(name: str) -> Any:
    """Return an internal by `module:qualified.name`, or fail and name what is missing."""
    module, _, path = name.partition(":")
    try:
        return reduce(getattr, path.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        pytest.fail(f"DVC {VERSION} has no {name} any more ({error}); adapt tav/versioning/dvc_internals.py", False)


def check_call(name: str, positional: int, keywords: list[str]) -> None:
    signature = inspect.signature(look_up(name))
    try:
        signature.bind(*[SELF] * positional, **dict.fromkeys(keywords))
    except TypeError as error:
        pytest.fail(
            f"DVC {VERSION}: {name}{signature} cannot be called as it is used ({error}); "
            "adapt tav/versioning/dvc_internals.py",
            False,
        )


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Open a project: its repo, project file, one stage, and the stage's output, dependency and parameters."""
    folder = tmp_path_factory.mktemp("live")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(folder).items():
            patch.setenv(name, value)
        root = make_project(folder / "project")
        patch.chdir(root)
        with locked_repo(root) as repo:
            from dvc.dependency import ParamsDependency
            from dvc.dvcfile import ProjectFile

            project = ProjectFile(repo, str(root / "dvc.yaml"))
            stage = project.stages["decode@ball"]
            files = [one for one in stage.deps if not isinstance(one, ParamsDependency)]
            parameters = [one for one in stage.deps if isinstance(one, ParamsDependency)]
            yield {
                "repo": repo,
                "project": project,
                "stage": stage,
                "output": stage.outs[0],
                "dependency": files[0],
                "parameters": parameters[0],
            }


@pytest.mark.parametrize("name", CALLS)
def test_a_function_is_there_and_takes_the_arguments(name: str) -> None:
    import_dvc()
    check_call(name, *CALLS[name])


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_an_exception_is_there(name: str) -> None:
    import_dvc()
    assert issubclass(look_up(name), look_up("dvc.exceptions:DvcException"))


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_attribute_is_there(live: dict[str, Any], name: str) -> None:
    holder, *path = name.split(".")
    try:
        reduce(getattr, path, live[holder])
    except AttributeError as error:
        pytest.fail(f"DVC {VERSION}: {type(live[holder]).__name__}: {error}", False)


def test_dvc_yaml_is_read_from_attributes_that_can_be_set_in_advance(live: dict[str, Any]) -> None:
    from dvc.dvcfile import ProjectFile

    for name in ("contents", "lockfile_contents"):
        descriptor = inspect.getattr_static(ProjectFile, name)
        assert not isinstance(descriptor, property), f"DVC {VERSION}: ProjectFile.{name} is a property now"
        assert name in vars(live["project"]), f"DVC {VERSION}: ProjectFile.{name} is not kept in the object"


def test_loggers_of_dvc_are_the_applications() -> None:
    import_dvc()
    for name in ("dvc", "dvc_data", "dvc_objects"):
        assert not logging.getLogger(name).handlers
    from dvc import progress

    assert progress.logger.name == "dvc.progress"


def test_errors_of_dvc_become_one_line(tmp_path: Path) -> None:
    with pytest.raises(DvcError) as caught, locked_repo(tmp_path):
        pass
    assert str(caught.value) == " ".join(str(caught.value).split())


def test_the_cache_is_where_the_configuration_puts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    (tmp_path / ".dvc").mkdir()
    assert configured_cache_folder(tmp_path) == tmp_path / ".dvc/cache"
    (tmp_path / ".dvc/config").write_text("[cache]\n    dir = /srv/cache\n")
    assert configured_cache_folder(tmp_path) == Path("/srv/cache")


def test_what_is_missing_or_changed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import_dvc()
    from dvc.stage.cache import StageCache

    monkeypatch.setattr(StageCache, "restore", lambda self, stage: None)
    with pytest.raises(pytest.fail.Exception, match=r"StageCache\.restore\(self, stage\) cannot be called .*'dry'"):
        check_call("dvc.stage.cache:StageCache.restore", 2, ["dry"])
    monkeypatch.delattr(StageCache, "save")
    with pytest.raises(pytest.fail.Exception, match=r"has no dvc\.stage\.cache:StageCache\.save any more"):
        check_call("dvc.stage.cache:StageCache.save", 2, [])


def test_the_project_requires_the_minor_version_that_it_was_tested_with() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (dvc,) = [one for one in map(Requirement, dependencies) if one.name == "dvc"]
    major, minor = VERSION.split(".")[:2]
    assert str(dvc.specifier) == f"<{major}.{int(minor) + 1},>={major}.{minor}"
