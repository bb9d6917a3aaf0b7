"""Stores for the tests of tracking."""

import contextlib
import shutil
import sqlite3

import pytest

from tav.tracking.tracker import Tracker
from tests.support.mlflow_store import URI


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """A database with MLflow's tables, which take seconds to create."""
    root = tmp_path_factory.mktemp("empty")
    Tracker(URI, "tav", root).pipeline("ball", {})
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as database:
        database.executescript(
            "DELETE FROM tags; DELETE FROM latest_metrics; DELETE FROM metrics; DELETE FROM params; DELETE FROM runs;"
            "DELETE FROM experiment_tags; DELETE FROM experiments WHERE name = 'tav';"
        )
    return root / "mlflow.db"


@pytest.fixture
def root(tmp_path, empty_database):
    """A project with an empty store, in a folder whose name has a space and an accent."""
    root = tmp_path / "a projèct"
    root.mkdir()
    shutil.copy(empty_database, root / "mlflow.db")
    return root
