"""The watches of this process that are open: one of a training at a time, none left behind."""

from __future__ import annotations

import atexit
import logging
import weakref
from collections.abc import Sequence
from typing import Protocol

from torch.optim import Optimizer

from lsa.watching.weights import Weights

log = logging.getLogger("lsa.watch")


class Open(Protocol):
    """A watch that is open."""

    step: int

    def watches(self, weights: Weights, optimizers: Sequence[Optimizer]) -> bool:
        """Whether it is of the same training."""
        ...

    def close(self) -> None:
        """End it."""


_open: weakref.WeakSet[Open] = weakref.WeakSet()  # which keeps no network that is done with


def close_before(weights: Weights, optimizers: Sequence[Optimizer]) -> None:
    """Close a watch that is open for the same training, with one line.

    A cell of a notebook that is run again watches again what is watched already.
    """
    for other in [*_open]:
        if other.watches(weights, optimizers):
            if weights.leads:
                log.warning(
                    "watch: this training is watched already; the watch before is closed at step "
                    "%d, and the new one takes its place",
                    other.step,
                )
            other.close()


def add(watch: Open) -> None:
    """Close a watch when the process ends, if nobody else does."""
    _open.add(watch)
    atexit.unregister(_close_all)
    atexit.register(_close_all)  # so that it comes before the end of what the watch sends with


def remove(watch: Open) -> None:
    """A watch is closed."""
    _open.discard(watch)


def _close_all() -> None:
    for watch in [*_open]:
        watch.close()
