"""The parts that a pass over the data is made of, as functions of θ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Part:
    """One chunk or batch of a data set; L(θ) = ∑ weight · loss(θ)."""

    weight: float
    share: float  # n/N: its part of a mean over samples
    samples: int  # n
    loss: Function  # θ ↦ scalar
    losses: Function  # θ ↦ ℓᵢ(θ) of its samples, `(n,)`; their mean over all samples is L
    both: Callable[[Tensor], tuple[Tensor, Any]]  # θ ↦ those, and the network's outputs
    traced: Callable[[Tensor], tuple[Tensor, Tensor, list[Tensor]]]
    """θ ↦ the loss without penalty, the losses, and the outputs that both are made of."""
    wrong: Callable[[Any], Tensor | None]  # outputs ↦ which samples a classifier gets wrong, `(n,)`
    outputs: Function | None = None  # θ ↦ f(θ, xᵢ), `(n, …)`; None: known by `traced` alone
    loss_of: Function | None = None  # loss as a function of these outputs
    losses_of: Function | None = None  # losses as a function of these outputs
    alone: Callable[[Tensor, Tensor], Tensor] | None = None
    """(θ, index) ↦ the loss of one sample by itself, for `vmap`; None: samples cannot be parted."""
