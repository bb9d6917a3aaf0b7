"""What gets out: secrets of the environment and of addresses, modes of files, and which packages are installed."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tav_model.files import atomic_file, atomic_folder, write_json
from tav_model.tensors import save_tensors
from tests.support.projects import QUICK, ROOT, change_params, environment, fresh_clone, run
from tests.support.servers import free_port

# Secrets

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "planted-aws-key",
    "AWS_SESSION_TOKEN": "planted-aws-session",
    "HF_TOKEN": "planted-hub-token",
    "GIT_TOKEN": "planted-git-token",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-password",
}
OWN_FILES = (".dvc/config.local", ".git/")  # where the user has put them


def plant(project: Path) -> None:
    """A DVC remote with passwords, in the file that DVC keeps for such."""
    (project / ".dvc/config.local").write_text(
        "[core]\n    remote = store\n"
        "['remote \"store\"']\n"
        "    url = https://planted-user:planted-remote-url@127.0.0.1:9/x\n"
        "    password = planted-remote-password\n"
    )


def found(folder: Path) -> list[str]:
    """The files that hold a planted secret, but those where it was put."""
    return [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file()
        and not str(path.relative_to(folder)).startswith(OWN_FILES)
        and b"planted-" in path.read_bytes()
    ]


def test_a_planted_secret_is_found(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("token planted-x\n")
    assert found(tmp_path) == ["log"]


STAGE = """
from pathlib import Path
from tasks.clip_stages import ClipStages
stages = ClipStages(Path.cwd(), "ball")
stages.run("decode")
with stages.runs.tracker:
    stages.runs.pipeline.log_artifact(Path("results/ball/frames/source.mp4"))
    stages.runs.pipeline.finish()
"""


@pytest.mark.long
@pytest.mark.parametrize("tracked", ["database", "server that is away"])
def test_no_secret_is_logged_by_a_stage(tmp_path: Path, tracked: str) -> None:
    project = fresh_clone(tmp_path / "project")
    change_params(project, QUICK)
    plant(project)
    if tracked != "database":
        uri = f"http://alice:planted-login@127.0.0.1:{free_port()}/?token=planted-token"
        change_params(project, {"tracking": {"uri": uri}})
    said = run(project, sys.executable, "-c", STAGE, **SECRETS).stdout
    assert "planted-" not in said
    if tracked == "database":
        assert (project / "mlflow.db").exists() and found(project) == []
    else:
        assert (project / ".tav/tracking-missed.jsonl").exists() and found(project) == ["params.yaml"]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_no_secret_is_in_the_stores_of_a_whole_run(tmp_path: Path, prefect: dict[str, str]) -> None:
    """Prefect's database, MLflow's, artifacts, logs and results, after a run of the deployment."""
    from tests.support.servers import run_deployment, serving

    project = fresh_clone(tmp_path / "project")
    change_params(project, QUICK)
    plant(project)
    settings = prefect | SECRETS
    with serving(project, settings):
        run_deployment(project, settings, clips=["ball"])
    assert (project / "mlflow.db").exists() and (tmp_path / "prefect").exists()
    assert found(tmp_path) == [f"project/{name}" for name in (".dvc/config.local",)]


# Modes


@pytest.mark.parametrize(("umask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_files_have_the_users_mode(tmp_path: Path, umask: int, file_mode: int, folder_mode: int) -> None:
    import torch

    before = os.umask(umask)
    try:
        with atomic_file(tmp_path / "one") as path:
            path.write_text("x")
        with atomic_folder(tmp_path / "many") as folder:
            (folder / "plain").write_text("x")
            write_json(folder / "a.json", {})
            save_tensors(folder / "a.safetensors", {"x": torch.ones(1)}, {})
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o777 == (folder_mode if path.is_dir() else file_mode), path


@pytest.mark.long
@pytest.mark.parametrize(("umask", "forbidden"), [("022", 0o022), ("077", 0o077)])
def test_a_stage_keeps_to_the_users_umask(tmp_path: Path, umask: str, forbidden: int) -> None:
    project = fresh_clone(tmp_path / "project")
    change_params(project, QUICK | {"tracking": {"uri": None}})
    script = f"umask {umask}; exec {sys.executable} -m tasks decode --clip ball"
    subprocess.run(["sh", "-c", script], cwd=project, env=environment(), check=True, capture_output=True)
    made = [path for name in ("results", "logs", ".tav") for path in (project / name).rglob("*")]
    assert len(made) > 4
    for path in made:
        allowed = (0o777 if path.is_dir() else 0o666) & ~forbidden
        assert path.stat().st_mode & 0o777 == allowed, path


# Packages


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(one.name): str(one.specifier) for one in requirements}


def closure(requirements: list[str]) -> dict[str, str]:
    """What the requirements install here, with all that these require in turn; the versions by name."""
    found: dict[str, str] = {}
    waiting = [(Requirement(text), "") for text in requirements]
    seen = set()
    while waiting:
        requirement, extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in ("", *requirement.extras):
            if (name, wanted) in seen:
                continue
            seen.add((name, wanted))
            try:
                one = importlib.metadata.distribution(name)
            except importlib.metadata.PackageNotFoundError:
                continue
            found[name] = one.version
            waiting += [(Requirement(text), wanted) for text in one.requires or ()]
    return found


def test_every_installed_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [one for extra in project["optional-dependencies"].values() for one in extra]
    installed, pins = closure(wanted), pinned()
    # The project itself, and what installs it, which the virtual environment brings along.
    installed = {name: version for name, version in installed.items() if name not in (project["name"], "pip")}
    assert len(installed) > 100
    assert sorted(installed.keys() - pins.keys()) == []
    assert all(re.fullmatch(r"==[^,*]+", version) for version in pins.values())
