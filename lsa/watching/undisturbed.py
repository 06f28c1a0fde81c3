"""What a measurement must leave as it was: random states, and those of the data it reads."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lsa.landscape.kernels import eager

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
def undisturbed(tensors: list[Tensor], *sources: Any) -> Iterator[None]:
    """A block after which random states and the contents of some tensors are as before it.

    Random states are those of torch (CPU and every GPU in use), NumPy and Python, and of the
    generators that DataLoaders and their samplers hold. Gradients are on within, autocast is off,
    and what is compiled runs as it is written.

    Args:
        tensors: Copied before and written back where something has written into them.
        *sources: DataLoaders that are read within.
    """
    cards = [i for i in range(torch.cuda.device_count())] if torch.cuda.is_initialized() else []
    generators = [g for source in sources for g in _generators(source)]
    states = [generator.get_state() for generator in generators]
    kept = [(t, t._version, t.detach().clone()) for t in tensors]
    of_python, of_numpy = random.getstate(), np.random.get_state()
    devices = {"cpu", *("cuda" for _ in cards[:1])}
    token = _MEASURING.set(True)
    try:
        with contextlib.ExitStack() as stack:
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
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        with torch.no_grad():
            for tensor, version, copy in kept:
                if tensor._version != version:
                    tensor.copy_(copy)


def _generators(source: Any) -> Iterator[torch.Generator]:
    """The generators that a DataLoader draws from, each once."""
    holders = [source, getattr(source, "sampler", None), getattr(source, "batch_sampler", None)]
    holders.append(getattr(holders[2], "sampler", None))
    generators = [getattr(holder, "generator", None) for holder in holders]
    yield from {id(g): g for g in generators if isinstance(g, torch.Generator)}.values()
