"""A time limit for what runs in this process."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class TimeUp(BaseException):
    """The limit is over; no library takes this for an error of its own."""


failed = (Exception, TimeUp)
"""What a contestant may end with."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise `TimeUp` in the block after so many seconds; between two steps of Python."""

    def end(*_: Any) -> None:
        raise TimeUp(f"over {seconds:.0f} s")

    if not math.isfinite(seconds):
        yield
        return
    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
