"""Preconditioners by optimizer class: how a parameter's step divides the gradient, and how far.

Many optimizers step by θ ← θ − η K P⁻¹(∇L + λθ): P is symmetric and positive, λ an L2 penalty, and
K averages over steps (momentum). With P at rest such steps diverge on a quadratic exactly where the
largest eigenvalue of P⁻¹(H + λI) passes 2/(ηk). k is the gain of K for a gradient that changes
its sign in every step, because the first growing mode does (Cohen et al. 2022, "Adaptive gradient
methods at the edge of stability", arXiv 2207.14484, §2). Decoupled weight decay, a factor 1 − ηλ
on θ, turns the 2 into 2 − ηλ.

A rule says P and this threshold of one parameter. `preconditioner` registers it for a class.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True)
class Preconditioner:
    """P, symmetric and positive, in float64."""

    diagonal: Tensor  # of P, (n,)
    inverse_root: Callable[[Tensor], Tensor]  # v ↦ P^(−½)v, both (n,)
    diagonal_alone: bool = False  # whether P is its diagonal


@dataclass(frozen=True)
class Rule:
    """The step of one parameter: P, threshold, formula and penalty."""

    P: Tensor | Preconditioner | None  # a tensor is P's diagonal; None before the first step
    threshold: float | None  # largest eigenvalue of P⁻¹(H + λI) without divergence; None: unknown
    formula: str = ""  # of the threshold, in η and the options
    penalty: float = 0.0  # λ of an L2 penalty that the optimizer adds to the gradient


# (parameter, its group, its state) → its rule, or the reason why there is none.
Reader = Callable[[Tensor, Mapping[str, Any], Mapping[str, Any]], Rule | str]
R = TypeVar("R", bound=Reader)

_READERS: dict[str, Reader] = {}


def preconditioner(*classes: type[Optimizer] | str) -> Callable[[R], R]:
    """Register how optimizers of some classes, and of classes derived from them, step::

        @lsa.preconditioner(SignedRoot)
        def _(parameter, group, state):
            return lsa.Rule(P=state["second"].sqrt(), threshold=2 / group["lr"], formula="2/η")

    Args:
        *classes: Classes, or `package:Class` where the package need not be installed.

    Returns:
        A decorator for a function (parameter, group, state) → `Rule`, called for every parameter
        with its entry of `param_groups` and of `state`. It returns a text instead, the reason,
        where the optimizer has no preconditioner, as a method that steps by signs.
    """

    def register(reader: R) -> R:
        for known in classes:
            name = known if isinstance(known, str) else f"{known.__module__}:{known.__qualname__}"
            _READERS[name] = reader
        return reader

    return register


def reader_of(optimizer: Optimizer) -> tuple[Reader | None, list[str]]:
    """The reader of an optimizer's rule, registered for its class or the nearest base, and notes.

    Where nothing is registered, None, and the note says so.
    """
    own = type(optimizer)
    for base in own.__mro__:
        package = base.__module__.partition(".")[0]
        for name in (f"{base.__module__}:{base.__qualname__}", f"{package}:{base.__qualname__}"):
            if name not in _READERS:
                continue
            changed = inspect.unwrap(own.step) is not inspect.unwrap(base.step)  # type: ignore[arg-type]
            note = f"{own.__name__} has a step of its own; it is read as {base.__name__}"
            return _READERS[name], [note] if changed else []
    return None, [
        f"the preconditioner of {own.__name__} is not known; register it with lsa.preconditioner"
    ]


def edge(rate: float, gain: float = 1.0, decay: float = 0.0) -> float | None:
    """The threshold (2 − ηλ)/(ηk); infinite at a rate of zero, None where nothing is stable.

    Args:
        rate: η.
        gain: k of the average over steps.
        decay: ηλ of decoupled weight decay.
    """
    if not (rate >= 0 and gain > 0 and decay < 2):
        return None
    return (2 - decay) / (rate * gain) if rate else float("inf")


def rotated(values: Tensor, bases: Sequence[Tensor | None]) -> Preconditioner:
    """P = Q diag(values) Qᵀ with Q a product of orthogonal matrices, one per side of a tensor.

    Args:
        values: Eigenvalues of P, in the parameter's shape.
        bases: For each side its eigenvectors as columns; None where the side is not rotated.
    """
    values = values.double()
    sides = [None if Q is None else Q.to(values) for Q in bases]
    scale = values.rsqrt()

    def turned(V: Tensor, back: bool) -> Tensor:
        for side, Q in enumerate(sides):
            if Q is not None:
                V = torch.movedim(V.movedim(side, -1) @ (Q.T if back else Q), -1, side)
        return V

    def inverse_root(v: Tensor) -> Tensor:
        V = turned(v.view(values.shape), back=False)
        return turned(V * scale, back=True).reshape(-1)

    diagonal = values
    for side, Q in enumerate(sides):
        if Q is not None:
            diagonal = (diagonal.movedim(side, -1) @ Q.square().T).movedim(-1, side)
    return Preconditioner(diagonal.reshape(-1), inverse_root)
