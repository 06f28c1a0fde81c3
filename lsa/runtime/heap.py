"""What the C library does with memory that is freed: within a step it is kept for what comes next.

glibc gives large blocks back to the system as they are freed, and what a pass saves is freed with
its graph. So every pass would take the same memory anew, a page fault for each 4 KiB, which the
kernel has to clear: with simple_cnn a Hessian product took a Xeon 1.17 times as long and an epoch
up to 1.3 times, by chance of how the heap lay. Other systems are left as they are, as is a user who
has set the C library's own variables.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SWITCH = "LSA_KEEP_FREED"  # environment variable; `off` leaves the C library as it is
# Variables of glibc itself: who sets them has chosen.
TUNED = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_")
# Parameters of `mallopt` (malloc.h).
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEPT = {TRIM_THRESHOLD: (1 << 31) - 1, MMAP_THRESHOLD: 1 << 30}  # bytes; the first is an int's most
# Where glibc's own thresholds end in a process that frees large blocks (mallopt(3)).
USUAL = {TRIM_THRESHOLD: 64 << 20, MMAP_THRESHOLD: 32 << 20}

_depth = 0  # of calls within each other, in this process as a whole, as the heap is


@contextmanager
def kept() -> Iterator[None]:
    """Within it this process keeps what it frees: blocks up to 1 GB, and up to 2 GB of them.

    After it all that is free goes back to the system.
    """
    global _depth
    library = _glibc()
    if library is None:
        yield
        return
    _depth += 1
    _set(library, KEPT)
    try:
        yield
    finally:
        _depth -= 1
        if not _depth:
            _set(library, USUAL)
            library.malloc_trim(0)


def _set(library: ctypes.CDLL, thresholds: dict[int, int]) -> None:
    for parameter, value in thresholds.items():
        if not library.mallopt(parameter, value):
            # Older versions refuse more than 32 MB for the second, and setting the first has ended
            # their own adjustment of it, which starts at 128 kB.
            library.mallopt(parameter, USUAL[parameter])


def _glibc() -> ctypes.CDLL | None:
    """The C library, where it is glibc and lsa's to set."""
    if sys.platform != "linux" or os.environ.get(SWITCH) == "off":
        return None
    if any(os.environ.get(name) for name in TUNED):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
