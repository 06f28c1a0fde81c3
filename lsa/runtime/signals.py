"""SIGINT and SIGTERM as an exception, so that whatever is open can be ended properly."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

AGAIN = 0.05  # seconds until an exception that was lost is raised again
_put_off: list[int] | None = None  # signals that wait for the end of a block of `held`


class Killed(BaseException):
    """A signal asked the process to stop; raised in the main thread, where the work is."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number
        self.run_ended = False  # whether the store has taken that its run is KILLED


def behind(error: BaseException | None) -> Killed | None:
    """The signal that caused an error: an import may replace the exception that a signal raised."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, Killed):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def catch(
    made: Callable[[int], BaseException] = Killed,
    numbers: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM),
) -> Callable[[], None]:
    """Raise an exception on the first signal; while it lives, ignore more, so that clean-up ends.

    Python drops an exception that is raised in a weak reference's callback or a finaliser (to
    import MLflow is to run thousands), and a library may drop any. What is dropped is raised again.

    Args:
        made: The exception for a signal's number. Its class must allow weak references.
        numbers: The signals.

    Returns:
        What puts the former handlers back.
    """
    former = {number: signal.getsignal(number) for number in numbers}
    raised: list[weakref.ref] = []
    over = threading.Event()

    def stop(number: int, _: Any) -> None:
        if over.is_set() or (raised and raised[-1]() is not None):
            return
        if _put_off is not None:
            _put_off.append(number)
            return
        error = made(number)
        raised[:] = [weakref.ref(error, lambda _: dropped(number))]
        try:
            raise error
        finally:
            del error  # which its own traceback would keep alive

    def dropped(number: int) -> None:
        if not over.is_set():
            later = threading.Timer(AGAIN, again, (number,))
            later.daemon = True
            later.start()

    def again(number: int) -> None:
        if not over.is_set():
            os.kill(os.getpid(), number)

    def restore() -> None:
        over.set()
        for number, handler in former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    for number in numbers:
        signal.signal(number, stop)
    return restore


@contextlib.contextmanager
def caught() -> Iterator[None]:
    """Raise `Killed` on a signal within the block, which should deal with it."""
    restore = catch()
    try:
        yield
    finally:
        restore()


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Delay signals to the end of the block, so that the block is never interrupted.

    Signals reach the main thread alone, so in other threads this does nothing.
    """
    global _put_off
    if _put_off is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _put_off = []
    try:
        yield
    finally:
        late, _put_off = _put_off, None
        if late:
            os.kill(os.getpid(), late[0])
