"""Prefect's database: each project has its own in `.tav/prefect/`, unless the user has chosen another."""

from __future__ import annotations

from pathlib import Path

# Where one of these is set, the user has chosen a database. Prefect counts a URL that refers to the password as not set.
CHOICES = {"connection_url", "driver", "password"}


def project_database(root: Path) -> dict[str, str]:
    """Return the settings with which a Prefect server keeps its runs in the project, as environment variables.

    They are empty where the user has chosen a database or a home for Prefect, in any of its sources: the environment,
    `.env`, prefect.toml, pyproject.toml or the active profile.
    """
    from prefect.settings import Settings

    settings = Settings()
    if "home" in settings.model_fields_set or CHOICES & settings.server.database.model_fields_set:
        return {}
    folder = root / ".tav" / "prefect"
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{folder}/prefect.db",
        # What the server notes about its database. Projects that shared the file would overwrite each other's notes,
        # and each start of a server would take seconds longer.
        "PREFECT_SERVER_MEMO_STORE_PATH": str(folder / "memo_store.toml"),
    }
