"""How worker processes start: forked from one that has imported what each of them needs.

So a study of any number of workers pays the imports twice, and a worker in place of a dead one is
there at once. The forked process computes nothing, so that it has no threads to be lost by a fork.
"""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing import forkserver
from multiprocessing.context import BaseContext

PRELOADED = ["lsa.studies"]
FORKS = sys.platform == "linux"  # system libraries of macOS do not survive a fork


def context() -> BaseContext:
    """How they start on this system; where nothing is forked, from a fresh interpreter."""
    if not FORKS:
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    return found


def prepare() -> None:
    """Begin the imports now, beside this process's own."""
    if FORKS:
        context()
        forkserver.ensure_running()
