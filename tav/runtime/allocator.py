"""The setting of the C library's allocator under which torch is fastest on a CPU."""

from __future__ import annotations

import ctypes
import sys

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> None:
    """Let this process use the memory of freed tensors again instead of returning it and asking for new.

    A UNet makes and frees tensors of tens of megabytes in every layer. By default each is mapped anew, and the system
    zeroes each of its pages at the first touch, which costs a tenth of the time. Only glibc is told; elsewhere this does
    nothing.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # Another C library.
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, LARGEST_INT)
