"""Python's search for garbage, which is put off while a command starts.

Importing torch and MLflow makes half a million objects that stay, and by default they are searched
again and again as they come: a quarter of the time that the imports take.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

SELDOM = (50_000, 20, 100)  # as `gc.set_threshold` takes them
_usual: tuple[int, int, int] | None = None  # while the search is put off, how often it was


@contextmanager
def put_off() -> Iterator[None]:
    """Within it garbage is searched for seldom, until `resume`."""
    global _usual
    if _usual is None:
        _usual = gc.get_threshold()
        gc.set_threshold(*SELDOM)
    try:
        yield
    finally:
        resume()


def resume() -> None:
    """Search as before: what is computed from here on may leave large garbage."""
    global _usual
    if _usual is not None:
        gc.set_threshold(*_usual)
        _usual = None
