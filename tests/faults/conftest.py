"""One uninterrupted run, for all tests that compare with it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.killing import Forked, check_complete, make_project, wait


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, float]:
    """A project in which nothing has run, one that has run and was never killed, and the seconds that took."""
    folder = tmp_path_factory.mktemp("forked")
    template = make_project(folder / "template", tracking={"uri": None})
    reference = Path(shutil.copytree(template, folder / "reference"))
    seconds = wait(Forked(reference))
    check_complete(reference)
    return template, reference, seconds
