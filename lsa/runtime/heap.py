"""What the C library does with memory that is freed: lsa's processes keep it for what comes next.

glibc gives large blocks back to the system as they are freed, and what a pass saves is freed with
its graph. So every pass would take the same memory anew, a page fault for each 4 KiB, which the
kernel has to clear: with simple_cnn a Hessian product took a Xeon 1.17 times as long and an epoch
up to 1.3 times, by chance of how the heap lay, and with 124 million parameters a fifth of the time
of a gradient and its check was the kernel's. Other systems are left as they are, as is a user who
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
NEVER, LARGEST = -1, (1 << 31) - 1  # to trim; a block, as large as an int says
OLDER = 32 << 20  # bytes: the largest block of versions before 2.35
KEPT = 2 << 30  # bytes that are kept where others may need them
_keeps = False


class _Use(ctypes.Structure):
    """What `mallinfo2` tells, in bytes or blocks."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def keep() -> None:
    """Let this process keep freed memory, in blocks up to 2 GB, until `give_back`.

    For the start of a program: the setting is the whole process's.
    """
    global _keeps
    library = _glibc()
    if library is None:
        return
    _keeps = hasattr(library, "mallinfo2")
    library.mallopt(TRIM_THRESHOLD, NEVER if _keeps else LARGEST)
    if not library.mallopt(MMAP_THRESHOLD, LARGEST):
        # Setting the first has ended the C library's own adjustment of the second, from 128 kB.
        library.mallopt(MMAP_THRESHOLD, OLDER)


def give_back() -> None:
    """Return what is freed and kept to the system, if it is more than 2 GB.

    For the end of a step, and before a process asks how much memory is free.
    """
    library = _glibc() if _keeps else None
    if library is None:
        return
    library.mallinfo2.restype = _Use
    if library.mallinfo2().fordblks > KEPT:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc and the user has not set it; else None."""
    if sys.platform != "linux" or variables.off(variables.KEEP_FREED):
        return None
    if any(os.environ.get(name) for name in TUNED):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
