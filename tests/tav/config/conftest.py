"""params.yaml files to read and change."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.params import SHORT


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(SHORT)
    return path


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for tests that write it many times."""
    return tmp_path_factory.mktemp("scratch") / "params.yaml"
