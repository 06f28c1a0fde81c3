"""What a measurement must leave as it was: random states, and what modules hold."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch

from lsa.landscape.kernels import eager
from lsa.watching.kept import kept

_ALONE = threading.RLock()  # two threads would put back what the other has set for its measurement
if hasattr(os, "register_at_fork"):  # in a child nobody would ever release it
    os.register_at_fork(after_in_child=_ALONE._at_fork_reinit)  # pyright: ignore
_MEASURING = ContextVar("measuring", default=False)


def in_measurement() -> bool:
    """Whether a measurement is being made, of whichever watch."""
    return _MEASURING.get()


def measuring() -> bool:
    """Whether a pass is none of the training's: a measurement's, of whichever watch, or one that is
    transformed (`torch.func`), as for gradients of single samples.
    """
    transformed = torch._C._functorch.maybe_current_level()  # pyright: ignore[reportAttributeAccessIssue]
    return _MEASURING.get() or transformed is not None


@contextlib.contextmanager
def undisturbed(*holders: Any) -> Iterator[None]:
    """A block after which random states and what modules hold are as before it.

    Random states are those of torch (CPU and every GPU in use), NumPy and Python. Gradients are on
    within, autocast is off, and what is compiled runs as it is written.

    Args:
        *holders: Modules and functions, of which `kept` says what is put back.
    """
    with _ALONE, _undisturbed(*holders):
        yield


@contextlib.contextmanager
def _undisturbed(*holders: Any) -> Iterator[None]:
    cards = [i for i in range(torch.cuda.device_count())] if torch.cuda.is_initialized() else []
    of_python, of_numpy = random.getstate(), np.random.get_state()
    devices = {"cpu", *("cuda" for _ in cards[:1])}
    token = _MEASURING.set(True)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(kept(*holders))
            stack.enter_context(torch.random.fork_rng(cards))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(eager())
            for device in devices:
                stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        _MEASURING.reset(token)
        random.setstate(of_python)
        np.random.set_state(of_numpy)
