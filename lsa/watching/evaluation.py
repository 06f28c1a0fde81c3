"""How a network is evaluated: in which precision, and whether it draws random numbers."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lsa.landscape.network import HALF
from lsa.landscape.terms import Objective, Terms


class Evaluation(NamedTuple):
    """What one pass has shown."""

    half: torch.dtype | None  # the coarsest half precision of weights or outputs of modules
    draws: bool  # random numbers of torch, NumPy or Python


def seen_in(model: nn.Module, run: Callable[[], Any]) -> Evaluation:
    """See what a forward pass does.

    Weights in float32 do not tell the precision: Accelerate has the network compute in bfloat16
    by itself, and FSDP2 casts its weights.

    Args:
        model: The network.
        run: Makes a pass.
    """
    found = {p.dtype for p in model.parameters()}
    before = _states()
    with _outputs_of(model, lambda output: found.update(_dtypes(output))):
        run()
    half = max((d for d in found if d in HALF), key=lambda d: torch.finfo(d).eps, default=None)
    return Evaluation(half, before != _states())


@contextlib.contextmanager
def _outputs_of(model: nn.Module, see: Callable[[Any], None]) -> Iterator[None]:
    """A block in which the outputs of all modules are shown.

    Not of those that are compiled in place: with hooks they would be compiled anew.
    """
    modules = [*model.modules()]
    if any(getattr(m, "_compiled_call_impl", None) is not None for m in modules):
        modules = []
    handles = [m.register_forward_hook(lambda _m, _x, output: see(output)) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _dtypes(output: Any) -> set[torch.dtype]:
    return {t.dtype for t in tree_leaves(output) if isinstance(t, Tensor)}


def _states() -> list[Any]:
    """Random states, as what can be compared."""
    states = [torch.get_rng_state(), *(_cards() if torch.cuda.is_initialized() else [])]
    numpy = np.random.get_state(legacy=False)["state"]
    return [
        *(state.numpy().tobytes() for state in states),
        *(v.tobytes() if isinstance(v, np.ndarray) else v for v in numpy.values()),
        random.getstate(),
    ]


def _cards() -> list[Tensor]:
    return [torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())]


def seeded(objective: Objective) -> Objective:
    """The same objective, which draws the same random numbers at every call.

    For a block after which random states are put back.
    """

    def fixed(model: nn.Module, batch: Any) -> Terms:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        return objective(model, batch)

    return fixed
