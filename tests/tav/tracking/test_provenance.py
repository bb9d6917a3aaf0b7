"""Tags that name the revision, and whether it has changes."""

import subprocess

from tav.tracking.provenance import environment_tags, git_revision
from tav.tracking.tracker import Tracker
from tests.support.mlflow_store import PARAMS, URI


def test_tags_name_the_revision_and_whether_it_has_changes(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    git("init", "-q")
    git_revision.cache_clear()
    assert "mlflow.source.git.commit" not in environment_tags(tmp_path)
    for name in ("params.yaml", "dvc.lock"):
        (tmp_path / name).write_text("a")
    git("add", ".")
    git("commit", "-qm", "first")
    (tmp_path / "dvc.lock").write_text("b")
    git_revision.cache_clear()
    tags = environment_tags(tmp_path)
    assert tags["mlflow.source.git.commit"] == git("rev-parse", "HEAD").strip()
    assert tags["tav.git.dirty"] == "False"
    (tmp_path / "params.yaml").write_text("b")
    git_revision.cache_clear()
    assert environment_tags(tmp_path)["tav.git.dirty"] == "True"


def test_git_is_asked_once_and_only_when_a_run_is_opened(root, monkeypatch):
    git_revision.cache_clear()
    commands = []
    run = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **options: commands.append(command) or run(command, **options)
    )
    trackers = [Tracker(URI, "tav", root) for _ in range(3)]
    Tracker(None, "tav", root).pipeline("ball", PARAMS)
    assert commands == []
    for tracker in trackers:
        tracker.pipeline("ball", PARAMS).child("tune", "tune", "tune")
    assert [command[0] for command in commands] == ["git"]
