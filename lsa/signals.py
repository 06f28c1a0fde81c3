"""SIGINT and SIGTERM as one exception, so that whatever is open can be ended properly."""

from __future__ import annotations

import signal
from typing import Any


class Killed(BaseException):
    """A signal asked the process to stop; raised in the main thread, where the work is."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def catch() -> None:
    """Raise `Killed` on the first SIGINT or SIGTERM; ignore more, so that the clean-up ends."""

    def stop(number: int, _: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Killed(number)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
