"""`tav up` and `tav down`: what they print; what the services do is in tests/flows/test_services.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows import services
from tests.support.tav_command import Tav


@pytest.mark.parametrize(
    ("mlflow", "line"),
    [
        ("http://127.0.0.1:1", "MLflow    http://127.0.0.1:1"),  # where nothing answers
        ("", "MLflow    none: tracking.uri is null in params.yaml"),
    ],
)
def test_up_prints_the_addresses_and_what_to_do_next(
    tav: Tav, new: Path, monkeypatch: pytest.MonkeyPatch, mlflow: str, line: str
) -> None:
    roots: list[Path] = []

    def start(root: Path) -> services.Services:
        roots.append(root)
        return services.Services(123, "http://127.0.0.1:4200", mlflow)

    monkeypatch.setattr(services, "start", start)
    ended = tav("up")
    assert (ended.code, ended.err, roots) == (0, "", [new])
    assert ended.out.splitlines() == [
        "Prefect   http://127.0.0.1:4200",
        line,
        "ready: prefect deployment run tav/edit-batch --watch      (stop: tav down)",
    ]


def test_down_prints_whether_there_was_anything_to_stop(tav: Tav, new: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tav("down") == (0, "not running\n", "")
    monkeypatch.setattr(services, "stop", lambda root: True)
    assert tav("down") == (0, "stopped\n", "")
