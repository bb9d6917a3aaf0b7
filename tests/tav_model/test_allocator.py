"""Tensors are in huge pages, until freed memory is returned to the system because it is enough to be worth it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tav_model import allocator
from tav_model.allocator import FreedMemory

# In a process of its own, whose heap has nothing else. Blocks of this size are not mapped one by one; those that are kept keep
# the heap from shrinking by itself.
PROGRAM = """
from pathlib import Path
from tav_model.allocator import FreedMemory

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

KEPT = """
import resource, sys
from pathlib import Path
from tav_model.allocator import FreedMemory, keep_freed_memory

if "limited" in sys.argv:
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
keep_freed_memory()

def huge():
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return int(rollup.split("AnonHugePages:")[1].split()[0]) >= 60_000

tensor = bytearray(b"1") * 2**26
first = huge()
del tensor
FreedMemory(share=0.0, least=0).give_back()
returned = huge()
tensor = bytearray(b"1") * 2**26
print(first, returned, huge())
"""
TRANSPARENT = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HAS_GLIBC = allocator._glibc() is not None and hasattr(allocator._glibc(), "mallinfo2")


@pytest.mark.skipif(not HAS_GLIBC, reason="not glibc 2.33 or later")
@pytest.mark.skipif(not TRANSPARENT.exists() or "[never]" in TRANSPARENT.read_text(), reason="no huge pages")
def test_tensors_are_in_huge_pages_until_memory_is_returned():
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "False"]


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_limit_of_memory_is_respected():
    done = subprocess.run([sys.executable, "-c", KEPT, "limited"], capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) == 3


@pytest.mark.skipif(not HAS_GLIBC, reason="not glibc 2.33 or later")
def test_returns_freed_memory():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "True", "False", "True"]


def test_does_nothing_with_another_c_library(monkeypatch):
    monkeypatch.setattr(allocator, "_glibc", lambda: None)
    assert not FreedMemory(share=0.0, least=0).give_back()
