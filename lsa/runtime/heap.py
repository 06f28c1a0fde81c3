"""What the C library does with memory that is freed: lsa's processes keep it for what comes next.

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

from lsa.runtime import variables

# Variables of glibc itself: who sets them has chosen.
TUNED = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_")
# Parameters of `mallopt` (malloc.h).
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEPT = {TRIM_THRESHOLD: (1 << 31) - 1, MMAP_THRESHOLD: 1 << 30}  # bytes; the first is an int's most
OLDER = 32 << 20  # bytes: the most that older versions take for the second


def keep() -> None:
    """Let this process keep freed memory: blocks up to 1 GB, and up to 2 GB in all.

    For the start of a program: the setting is the whole process's.
    """
    library = _glibc()
    if library is None:
        return
    for parameter, value in KEPT.items():
        if not library.mallopt(parameter, value):
            # Setting the first has ended the C library's own adjustment of the second, from 128 kB.
            library.mallopt(parameter, OLDER)


def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc and the user has not set it; else None."""
    if sys.platform != "linux" or variables.off(variables.KEEP_FREED):
        return None
    if any(os.environ.get(name) for name in TUNED):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
