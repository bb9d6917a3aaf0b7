"""The store's address, and which project it belongs to."""

import pytest

from tav.tracking.pages import VIEW_TAG, experiment_tags
from tav.tracking.store import project_root, resolve_uri, root_cause
from tav.tracking.tracker import Tracker
from tav_model.errors import TavError
from tests.support.mlflow_store import URI, client


def test_a_dvc_experiments_copy_logs_to_the_real_project(tmp_path):
    assert project_root(tmp_path) == tmp_path
    assert project_root(tmp_path / ".dvc" / "tmp" / "exps" / "standalone" / "tmpx" / "sub") == tmp_path
    tracker = Tracker(URI, "tav", tmp_path / ".dvc" / "tmp" / "exps" / "tmpx")
    assert tracker.delivery._store.uri == f"sqlite:///{tmp_path}/mlflow.db"


def test_relative_databases_count_from_the_root(tmp_path):
    assert (
        resolve_uri("sqlite:///runs/mlflow.db?timeout=30", tmp_path)
        == f"sqlite:///{tmp_path}/runs/mlflow.db?timeout=30"
    )
    assert resolve_uri("sqlite:////srv/mlflow.db", tmp_path) == "sqlite:////srv/mlflow.db"
    assert resolve_uri("http://127.0.0.1:5000", tmp_path) == "http://127.0.0.1:5000"
    assert resolve_uri("postgresql+psycopg2://h/d", tmp_path) == "postgresql+psycopg2://h/d"


@pytest.mark.parametrize("uri", ["mlruns", "", "file:///tmp/mlruns", "sqlite:///", "sqlite:///:memory:", "http:5000"])
def test_other_addresses_are_refused_by_name(tmp_path, uri):
    with pytest.raises(TavError, match=r"params\.yaml: tracking\.uri: .*sqlite:///mlflow\.db"):
        Tracker(uri, "tav", tmp_path)


def test_the_root_cause_is_one_line_without_secrets():
    cause = ConnectionError("refused by http://alice:geheim@host:5000/?token=abc123\nand more")
    cause.__cause__ = None
    error = RuntimeError("request failed")
    error.__cause__ = cause
    assert root_cause(error, "") == "refused by http://host:5000/"
    assert root_cause(ValueError("password geheim, token=abc123"), "http://alice:geheim@host/?token=abc123") == (
        "password ***, ***"
    )
    assert root_cause(ValueError(), "") == "ValueError"


def test_an_experiment_opens_on_its_runs_and_their_scores(root):
    """Also one that an earlier version has created, whose description may be the user's own."""
    store = client(root)
    experiment = store.create_experiment("tav", tags={"mlflow.note.content": "my own", VIEW_TAG: "{}"})
    Tracker(URI, "tav", root).pipeline("ball", {})
    tags = store.get_experiment(experiment).tags
    assert tags["mlflow.note.content"] == "my own"
    expected = experiment_tags()
    assert {name: tags[name] for name in expected if name != "mlflow.note.content"} == {
        name: text for name, text in expected.items() if name != "mlflow.note.content"
    }
