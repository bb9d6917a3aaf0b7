"""The settings of the C library's allocator under which torch is fastest on a CPU, and the memory that it keeps."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path

# Of glibc's malloc.h, and of Linux's mman.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
MADV_HUGEPAGE, MADV_NOHUGEPAGE = 14, 15
HUGE_PAGE = 2**21

# The part of the heap that is in huge pages: address and size.
_in_huge_pages: list[tuple[int, int]] = []


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
    """Return the C library if it is glibc."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    if not (hasattr(library, "mallopt") and hasattr(library, "malloc_trim")):
        return None
    if hasattr(library, "mallinfo2"):  # Since version 2.33.
        library.mallinfo2.restype = _MallInfo
    library.malloc.argtypes, library.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    library.free.argtypes = [ctypes.c_void_p]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library


def keep_freed_memory() -> None:
    """Let this process use the memory of freed tensors again instead of returning it and asking for new, in huge pages.

    A UNet makes and frees tensors of tens of megabytes in every layer. By default each is mapped anew, and the system
    zeroes each of its pages at the first touch, which costs a tenth of the time. Pages of 2 MiB instead of 4 KiB save
    another tenth. Only glibc is asked; elsewhere this does nothing.
    """
    if (library := _glibc()) is None:
        return
    library.mallopt(M_MMAP_MAX, 0)
    library.mallopt(M_TRIM_THRESHOLD, -1)  # Never.
    _use_huge_pages(library)


def _use_huge_pages(library: ctypes.CDLL) -> None:
    """Let the heap grow by half of the machine's memory, and have that in huge pages as soon as it is used.

    Memory counts only from its first use. Where the system counts it earlier, nothing is done.
    """
    if _counts_unused_memory():
        return
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    block = library.malloc(size)
    if block is None:  # Limited, for instance by `ulimit -v`.
        return
    start, end = -(-block // HUGE_PAGE) * HUGE_PAGE, (block + size) // HUGE_PAGE * HUGE_PAGE
    library.madvise(start, end - start, MADV_HUGEPAGE)
    _in_huge_pages.append((start, end - start))
    library.free(block)


def _counts_unused_memory() -> bool:
    try:
        return Path("/proc/sys/vm/overcommit_memory").read_text(encoding="ascii").strip() == "2"
    except OSError:
        return True


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
        if library is None or not hasattr(library, "mallinfo2"):
            return False
        heap = library.mallinfo2()
        used = heap.uordblks + heap.hblkhd
        unused = _resident_bytes() - used
        self._others = min(self._others, unused)
        if unused - self._others < max(self.least, self.share * used):
            return False
        while _in_huge_pages:  # Pages that come and go are cheaper if they are small.
            library.madvise(*_in_huge_pages.pop(), MADV_NOHUGEPAGE)
        library.malloc_trim(0)
        return True
