"""Prefect's database: the project's own by default, and the user's where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flows.project_database import project_database

PROFILE = """
active = "mine"

[profiles.mine]
{settings}
"""


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a project, which is the current one, of a user without any settings of Prefect's."""
    for name in list(os.environ):
        if name.startswith("PREFECT_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PREFECT_PROFILES_PATH", str(tmp_path / "profiles.toml"))
    root = tmp_path / "a project"
    root.mkdir()
    monkeypatch.chdir(root)
    return root


def write_profile(root: Path, settings: str) -> None:
    (root.parent / "profiles.toml").write_text(PROFILE.format(settings=settings))


def test_a_project_has_its_own(user: Path) -> None:
    settings = project_database(user)
    assert settings == {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{user}/.tav/prefect/prefect.db",
        "PREFECT_SERVER_MEMO_STORE_PATH": f"{user}/.tav/prefect/memo_store.toml",
    }
    assert (user / ".tav/prefect").is_dir()
    write_profile(user, 'PREFECT_LOGGING_LEVEL = "ERROR"')  # A profile about other things is no choice of a database.
    assert project_database(user) == settings


@pytest.mark.parametrize(
    "variables",
    [
        {"PREFECT_HOME": "elsewhere"},
        {"PREFECT_API_DATABASE_CONNECTION_URL": "sqlite+aiosqlite:////tmp/runs.db"},
        {"PREFECT_SERVER_DATABASE_CONNECTION_URL": "postgresql+asyncpg://me:secret@db/prefect"},
        {
            "PREFECT_API_DATABASE_CONNECTION_URL": "postgresql+asyncpg://me:${PREFECT_API_DATABASE_PASSWORD}@db/prefect",
            "PREFECT_API_DATABASE_PASSWORD": "secret",
        },
        {
            "PREFECT_SERVER_DATABASE_DRIVER": "postgresql+asyncpg",
            "PREFECT_SERVER_DATABASE_HOST": "db",
            "PREFECT_SERVER_DATABASE_USER": "me",
            "PREFECT_SERVER_DATABASE_NAME": "prefect",
        },
    ],
    ids=lambda variables: "+".join(variables),
)
def test_variables_of_the_user_win(user: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert project_database(user) == {} and not (user / ".tav").exists()


def test_the_profile_of_the_user_wins(user: Path) -> None:
    write_profile(user, 'PREFECT_API_DATABASE_CONNECTION_URL = "sqlite+aiosqlite:////tmp/runs.db"')
    assert project_database(user) == {}


def test_a_database_in_prefect_toml_wins(user: Path) -> None:
    (user / "prefect.toml").write_text('[server.database]\nconnection_url = "sqlite+aiosqlite:////tmp/runs.db"\n')
    assert project_database(user) == {}
