"""Noise of the gradient from the training's own: where a step adds up several gradients.

Accumulation adds those of k passes, DistributedDataParallel averages those of K processes. Of the
kK gradients a of b samples each, whose mean ḡ is what the optimizer is given,

    E|a|² = |G|² + tr C/b,    E|ḡ|² = |G|² + tr C/(kKb),

so one step gives both unknowns without bias (McCandlish et al. 2018, arXiv 1812.06162, App. A.1).
One step says little: the scale is the quotient of means over many.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from lsa.maths.ratios import fieller
from lsa.maths.sums import square
from lsa.watching.weights import Weights

WINDOW = 50  # measured steps over which the scale is averaged
LEAST = 8  # of them


class OwnNoise:
    """Squares of the gradients that one step adds up, as this process computes them.

    Hooks before autograd adds a gradient to `.grad` see that of one pass, and of one process.

    Args:
        model: As it is trained.
        weights: Of it.
    """

    def __init__(self, model: nn.Module, weights: Weights) -> None:
        self._model, self._weights = model, weights
        wrapped = isinstance(model, DistributedDataParallel)
        self._processes = torch.distributed.get_world_size(model.process_group) if wrapped else 1
        self._nodes: list[Any] = []  # torch keeps a hook as long as its node lives
        self._squares: list[Tensor] = []
        self._calls = [0] * len(weights.parameters)
        self._samples: int | None = None  # of a pass
        self._seen: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    @property
    def known(self) -> bool:
        """Whether steps have given numbers."""
        return bool(self._seen)

    def attach(self, due: Callable[[], bool]) -> list[Any]:
        """Hooks; none do anything in steps that are not `due`."""
        if self._weights.sharded:
            return []

        def size(_module: Any, args: Any, kwargs: Any) -> None:
            if not torch.compiler.is_compiling() and torch.is_grad_enabled() and due():
                leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
                self._samples = len(leaves[0]) if leaves and leaves[0].ndim else None

        def seen(i: int) -> Callable[..., None]:
            def hook(gradients: tuple[Tensor | None, ...]) -> None:
                g = gradients[0]
                if g is not None and due():
                    self._calls[i] += 1
                    self._squares.append(square(g.detach().to_dense().reshape(-1)))

            return hook

        handles = [self._model.register_forward_pre_hook(size, with_kwargs=True)]
        for i, p in enumerate(self._weights.parameters):
            if p.is_leaf and not p.is_complex():
                node: Any = p.view_as(p).grad_fn.next_functions[0][0]  # pyright: ignore
                self._nodes.append(node)
                handles.append(node.register_prehook(seen(i)))
        return handles

    def several(self) -> bool:
        """Whether this step has several gradients, so far."""
        return self._processes > 1 or max(self._calls) > 1

    def numbers(self, whole: float | None, scale: float) -> Mapping[str, float]:
        """Noise of the step at hand, and over those measured; nothing where it has one gradient.

        Args:
            whole: |ḡ|² before clipping, of a loss that is scaled.
            scale: Of the loss, by a GradScaler.
        """
        passes, squares, b = max(self._calls), self._squares, self._samples
        self.forget()
        n = passes * self._processes
        if n < 2 or whole is None or b is None:
            return {}
        device = squares[0].device
        each = passes * float(torch.stack([s.to(device) for s in squares]).sum())
        signal, trace = estimates(each / scale**2, whole / scale**2, n, b)
        if not math.isfinite(signal + trace):
            return {}
        self._seen.append((trace, signal))
        return {"noise_trace": trace, "gradient_squared": signal, **averaged(self._seen, n * b)}

    def forget(self) -> None:
        """Let the gradients of a step go."""
        self._squares, self._calls = [], [0] * len(self._calls)


def estimates(each: float, whole: float, n: int, b: int) -> tuple[float, float]:
    """|G|² and tr C, unbiased.

    Args:
        each: Mean of |a|² over some of n gradients.
        whole: |ḡ|² of the mean of all n.
        n: 2 or more.
        b: Samples of each.
    """
    return (n * whole - each) / (n - 1), b * n * (each - whole) / (n - 1)


def averaged(seen: deque[tuple[float, float]], samples: int) -> Mapping[str, float]:
    """The scale tr C/|G|² of means over steps with its 95 % interval, and the diversity.

    Nothing as long as the noise may hide the gradient.

    Args:
        seen: (tr C, |G|²) of each step.
        samples: Of a whole batch.
    """
    if len(seen) < LEAST:
        return {}
    pairs = torch.tensor(list(seen), dtype=torch.float64)
    interval = fieller(pairs[:, 0], pairs[:, 1])
    if interval is None:
        return {}
    trace, signal = pairs.mean(0).tolist()
    return {
        "noise_scale": trace / signal,
        "noise_scale_low": max(0.0, interval[0]),
        "noise_scale_high": interval[1],
        "gradient_diversity": (trace + signal) / (samples * signal + trace),
    }
