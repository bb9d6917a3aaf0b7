"""Freed memory is returned to the system, if it is enough to be worth it."""

import subprocess
import sys

import pytest

from tav_model import freed_memory
from tav_model.freed_memory import FreedMemory

# In a process of its own, whose heap has nothing else. Blocks of this size are not mapped one by one; those that are kept keep
# the heap from shrinking by itself.
PROGRAM = """
from pathlib import Path
from tav_model.freed_memory import FreedMemory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

memory = FreedMemory(share=0.0, least=2**24)
nothing_yet = memory.give_back()
blocks = [bytearray(b"1" * 60_000) for _ in range(1000)]
in_use = memory.give_back()
kept = blocks[::50]
del blocks
before = resident()
freed, again = memory.give_back(), memory.give_back()
print(nothing_yet, in_use, freed, again, before - resident() > 40_000_000)
"""


@pytest.mark.skipif(freed_memory._glibc() is None, reason="not glibc 2.33 or later")
def test_returns_freed_memory():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "True", "False", "True"]


def test_does_nothing_with_another_c_library(monkeypatch):
    monkeypatch.setattr(freed_memory, "_glibc", lambda: None)
    assert not FreedMemory(share=0.0, least=0).give_back()
