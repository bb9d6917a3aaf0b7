"""How OpenMP's threads wait: by what else runs on the machine, unless the user says it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tav.runtime import waiting
from tav.runtime.waiting import OURS, POLICY, SPIN_COUNT, SPINS, set_waiting

SPIN, SLEEP = {POLICY: "PASSIVE", SPINS: str(SPIN_COUNT)}, {POLICY: "PASSIVE"}


def chosen(**environment: str) -> dict[str, str]:
    before = dict(environment)
    set_waiting(environment)
    return {name: value for name, value in environment.items() if before.get(name) != value and name != OURS}


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "loadavg"
    monkeypatch.setattr(waiting, "LOAD", path)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    return path


def test_threads_spin_on_an_idle_machine_alone(load: Path) -> None:
    load.write_text("3.51 2.10 0.30 1/205 30512\n")
    assert chosen() == SPIN
    load.write_text("0.00 0.00 0.00 2/205 30512\n")  # What has just started is not in the averages.
    assert chosen() == SLEEP
    assert chosen(OMP_NUM_THREADS="3") == SPIN
    assert chosen(OMP_NUM_THREADS="many") == SLEEP


def test_processes_that_wake_up_for_a_moment_are_not_counted(load: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([3, 2, 1, 2, 4])
    monkeypatch.setattr(waiting, "LOAD", type("Load", (), {"read_text": lambda _: f"0 0 0 {next(counts)}/99 1"})())
    assert chosen() == SPIN


@pytest.mark.parametrize("text", ["", "0.00 0.00", "0 0 0 many/5 1"])
def test_threads_sleep_where_the_load_is_not_known(load: Path, text: str) -> None:
    assert chosen() == SLEEP  # no such file
    load.write_text(text)
    assert chosen() == SLEEP


def test_what_the_user_has_set_stays(load: Path) -> None:
    load.write_text("0.00 0.00 0.00 1/205 30512\n")
    assert chosen(**{POLICY: "ACTIVE"}) == {}
    assert chosen(**{SPINS: "7"}) == SLEEP


def test_child_processes_decide_anew(load: Path) -> None:
    environment: dict[str, str] = {}
    for running, spins in ((1, True), (5, False), (1, True)):
        load.write_text(f"0.00 0.00 0.00 {running}/205 30512\n")
        set_waiting(environment)
        assert (environment[POLICY], SPINS in environment) == ("PASSIVE", spins)
    environment = {SPINS: "7"}
    for _ in range(2):
        set_waiting(environment)
        assert (environment[POLICY], environment[SPINS]) == ("PASSIVE", "7")
