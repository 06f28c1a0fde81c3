"""The standard streams as a command needs them, whatever shell and locale have made of them."""

from __future__ import annotations

import contextlib
import io
import os
import sys

STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))  # by their file number


def prepare() -> None:
    """Open the streams that are closed (`lsa … 2>&-`), and let all take every character.

    What an encoding lacks is written out, `\\u03bb` for λ: a measurement must not fail because an
    ASCII terminal cannot show it. A closed stream's number would go to the next file that is
    opened, a database perhaps, and messages with it.
    """
    for number, (name, mode) in enumerate(STREAMS):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def silence() -> None:
    """Throw away what nobody reads any more, also at the exit, when Python would complain."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            getattr(sys, name).flush()
