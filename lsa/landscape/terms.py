"""The terms of a loss on one batch, which an objective returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Terms:
    """Loss terms of one batch: L = Σ total / Σ weight + penalty over the batches of a data set.

    The units of weight are whatever the mean runs over: samples, tokens, pixels, class weights.
    """

    total: Tensor  # (): the loss summed over the batch's units of weight
    weight: Tensor | float  # how much weight that is; must not depend on θ
    samples: Tensor | None = None  # (n,): the same sum per sample; None where samples interact
    weights: Tensor | None = None  # (n,): their weights; None: equal
    penalty: Tensor | None = None  # (): counted once, not averaged (a weight decay in the loss)
    outputs: Any = None  # pytree of tensors on the way to `total`, for a Gauss–Newton part


Objective = Callable[[nn.Module, Any], Terms]
"""`(model, batch) → Terms`; the model has θ inside."""
