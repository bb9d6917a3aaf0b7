"""Benchmarks set environment variables for their process, which is that of the tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _environment_of_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the variables back after each test."""
    monkeypatch.setenv("TAV_QUIET", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
