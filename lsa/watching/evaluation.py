"""How a network is evaluated: in which precision, with random numbers, with kinks."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lsa.landscape.network import HALF
from lsa.landscape.terms import Objective, Terms

# Operations of torch whose derivative jumps. `max` and `clamp` are often used where no kink is, as
# in a softmax by hand; a network that is taken for one with kinks is only measured more slowly.
KINKS = {
    "relu", "leaky_relu", "_prelu_kernel", "rrelu_with_noise", "rrelu_with_noise_functional",
    "threshold", "hardtanh", "relu6", "hardsigmoid", "softshrink", "hardshrink", "abs", "clamp",
    "clamp_min", "clamp_max", "maximum", "minimum", "max", "min", "amax", "amin", "aminmax",
    "median", "nanmedian", "kthvalue", "topk", "max_pool2d", "max_pool2d_with_indices",
    "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "fractional_max_pool2d", "fractional_max_pool3d", "mkldnn_max_pool2d", "mkldnn_max_pool3d",
}  # fmt: skip
SMOOTH = {"elu": 1.0}  # operations without a kink at this value of their first option alone


class Evaluation(NamedTuple):
    """What one pass has shown."""

    half: torch.dtype | None  # the coarsest half precision of weights or outputs of modules
    draws: bool  # random numbers of torch, NumPy or Python
    kinks: bool  # operations whose derivative jumps


def seen_in(model: nn.Module, run: Callable[[], Any]) -> Evaluation:
    """See what a forward pass does.

    Weights in float32 do not tell the precision: Accelerate has the network compute in bfloat16
    by itself, and FSDP2 casts its weights.

    Args:
        model: The network.
        run: Makes a pass.
    """
    found = {p.dtype for p in model.parameters()}
    before, operations = _states(), _Operations()
    with _outputs_of(model, lambda output: found.update(_dtypes(output))), operations:
        run()
    half = max((d for d in found if d in HALF), key=lambda d: torch.finfo(d).eps, default=None)
    return Evaluation(half, before != _states(), operations.kinks)


class _Operations(TorchDispatchMode):
    """A block in which operations of torch are seen, also those inside of functions."""

    def __init__(self) -> None:
        super().__init__()
        self.kinks = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operation."""
        name = func._schema.name.partition("::")[2].rstrip("_")
        if not self.kinks and args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            bent = name in SMOOTH and args[1:2] not in ((), (SMOOTH[name],))
            self.kinks = bent or name in KINKS
        return func(*args, **(kwargs or {}))


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
