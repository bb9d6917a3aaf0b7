"""The freed memory that the C library's allocator keeps, and how to return it to the system."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path


class _MallInfo(ctypes.Structure):
    """The result of `mallinfo2`: bytes in use, in the heap (`uordblks`) and in blocks of their own (`hblkhd`), and others."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


@cache
def _glibc() -> ctypes.CDLL | None:
    """Return the C library if it is glibc 2.33 or later."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    if not (hasattr(library, "mallinfo2") and hasattr(library, "malloc_trim")):
        return None
    library.mallinfo2.restype = _MallInfo
    return library


def _resident_bytes() -> int:
    """Return the memory of this process that is in no file."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    line = next(line for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


class FreedMemory:
    """Returns the pages of freed tensors to the system, once there are enough of them.

    Freed tensors leave holes in the heap, between those that are kept for the backward pass: a sixth of the heap, at the end
    of a forward pass of Stable Diffusion's UNet. Only glibc is asked; elsewhere this does nothing.

    Args:
        share: the holes that are worth it, as a share of what is used. Each return costs page faults when the memory is used
            again.
        least: the same in bytes.
    """

    def __init__(self, share: float, least: int = 2**25) -> None:
        self.share, self.least = share, least
        # What is resident besides tensors and holes, such as Python's own heap: the smallest difference seen so far.
        self._others = sys.maxsize

    def give_back(self) -> bool:
        """Return the pages if there are enough; return whether there were."""
        library = _glibc()
        if library is None:
            return False
        heap = library.mallinfo2()
        used = heap.uordblks + heap.hblkhd
        unused = _resident_bytes() - used
        self._others = min(self._others, unused)
        if unused - self._others < max(self.least, self.share * used):
            return False
        library.malloc_trim(0)
        return True
