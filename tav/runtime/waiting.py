"""How OpenMP's threads wait for one another, which must be decided before torch is imported."""

from __future__ import annotations

import os
import time
from collections.abc import MutableMapping
from pathlib import Path

POLICY, SPINS = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
OURS = "TAV_SET_WAITING"  # tells child processes which of the two are not the user's
# Threads that spin this often before they sleep are nearly as fast on an idle machine as those that always spin, and up to
# twice as fast as those that sleep at once. Beside another process on the same processors, they take about twice as long as the
# latter, and those that always spin twenty times as long (benchmarks/README.md).
SPIN_COUNT = 5000
LOAD = Path("/proc/loadavg")
LOOKS, SECONDS_BETWEEN = 5, 0.01


def set_waiting(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let threads spin for a moment before they sleep if the machine is idle, and sleep at once otherwise.

    What the user has set, stays. `OMP_WAIT_POLICY` counts everywhere, `GOMP_SPINCOUNT` for GNU's OpenMP, which torch has on
    Linux. Child processes decide anew: a service may start its runs hours later.
    """
    ours = environment.get(OURS, "").split()
    if POLICY in environment and POLICY not in ours:
        return
    environment[POLICY], environment[OURS] = "PASSIVE", POLICY
    if SPINS in environment and SPINS not in ours:
        return
    environment.pop(SPINS, None)
    if _has_idle_processors(environment.get("OMP_NUM_THREADS", "")):
        environment[SPINS], environment[OURS] = str(SPIN_COUNT), f"{POLICY} {SPINS}"


def _has_idle_processors(threads: str) -> bool:
    """Return whether so many threads, or one for each processor, have a processor of their own."""
    processors = os.cpu_count() or 1
    needed = int(threads) if threads.isdecimal() else processors
    others = []
    for look in range(LOOKS):
        if look:
            time.sleep(SECONDS_BETWEEN)
        try:
            running, _, _ = LOAD.read_text().split()[3].partition("/")
            others.append(int(running) - 1)  # This one is running, too.
        except (OSError, IndexError, ValueError):
            return False  # not Linux
    # Other processes wake up for a moment now and then; those that compute always run.
    return min(others) + needed <= processors
