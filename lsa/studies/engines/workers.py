"""How worker processes start: forked from one that has imported what each of them needs.

So a study of any number of workers pays the imports twice, and a worker in place of a dead one is
there at once. The forked process computes nothing, so that it has no threads to be lost by a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from multiprocessing import forkserver
from multiprocessing.context import BaseContext

PRELOADED = ["lsa.studies.study"]
LONGEST = 107  # bytes of a Unix socket's path on Linux, by which forks are asked for
SOCKET = "/pymp-12345678/listener-12345678"  # what multiprocessing calls it in the temporary folder


def forks() -> bool:
    """Whether they are forked here; else they start from a fresh interpreter.

    System libraries of macOS do not survive a fork, and a batch system's temporary folder may have
    a path too long for a socket in it.
    """
    if sys.platform != "linux":
        return False
    try:
        return len(os.fsencode(tempfile.gettempdir() + SOCKET)) <= LONGEST
    except FileNotFoundError:  # no folder that can be written
        return False


def context() -> BaseContext:
    """The start method of workers on this system."""
    if not forks():
        return multiprocessing.get_context("spawn")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    return server


def prepare() -> None:
    """Start the imports for workers now, while this process does its own."""
    if forks():
        context()
        forkserver.ensure_running()
