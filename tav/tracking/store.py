"""Where MLflow's store is, and the settings under which its client is used."""

from __future__ import annotations

import os
from pathlib import Path

from tav.runtime.redaction import redact
from tav_model.errors import TavError

SERVERS = ("http", "https", "postgresql", "mysql", "mssql")
# Read by MLflow; a user's own settings stand. No telemetry, since the project is offline by default; a server that
# is away costs one short wait, and the entry is sent later.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


def project_root(root: Path) -> Path:
    """`root`, or the project that it is a DVC experiment's temporary copy of (below `.dvc/tmp/exps`)."""
    parts = root.resolve().parts
    for i in range(len(parts) - 2):
        if parts[i : i + 3] == (".dvc", "tmp", "exps"):
            return Path(*parts[:i])
    return root.resolve()


def resolve_uri(uri: str, root: Path) -> str:
    """The tracking URI with a relative SQLite path made absolute from `root`.

    Raises:
        TavError: neither a database nor a server.
    """
    scheme = uri.partition(":")[0].partition("+")[0]
    if scheme in SERVERS and "://" in uri:
        return uri
    name, question, query = uri.removeprefix("sqlite:///").partition("?")
    if uri.startswith("sqlite:///") and name not in ("", ":memory:"):
        return f"sqlite:///{os.path.normpath(root / name)}{question}{query}"
    raise TavError(
        f"params.yaml: tracking.uri: {redact(uri)!r} is not allowed; give a database file (sqlite:///mlflow.db), "
        f"a server (http://127.0.0.1:5000) or another database ({', '.join(SERVERS[2:])})"
    )
