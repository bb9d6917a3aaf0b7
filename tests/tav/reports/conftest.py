"""A project with the results of one clip, for the tests of the report."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.reported import make_results


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that the tests of a module share."""
    return make_results(tmp_path_factory.mktemp("project"))


@pytest.fixture
def project(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "project"))
