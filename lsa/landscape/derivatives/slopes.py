"""Slopes ∇ℓᵢ(θ)·u of independent samples, with their losses and outputs, from one pass.

Both take `both`, θ `(d,)` ↦ losses `(n,)` and outputs `(n, …)`, and return losses, outputs and
slopes `(n,)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.func import jvp

from lsa.landscape.derivatives import products

Both = Callable[[Tensor], tuple[Tensor, Tensor]]


def by_layers(both: Both, theta: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By the gradients of each layer, where `lsa.landscape.derivatives.sample_gradients` has them.

    A backward pass without weight gradients, and then one operation a layer: less than the two
    that forward mode makes of every operation (simple_cnn: 2.5 forward passes
    for 3.4, on another day 3.2 for 3.5).
    """
    seen: list[Tensor] = []

    def losses(t: Tensor) -> Tensor:
        seen[:] = both(t)
        return seen[0]

    slopes = products.layered(losses, theta).push(u)
    values, outputs = seen
    return values.detach(), outputs.detach(), slopes


def by_forward_mode(both: Both, theta: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By the derivative of every operation along u."""
    found: Any = jvp(both, (theta.detach(),), (u,), has_aux=True)
    losses, slopes, outputs = found
    return losses, outputs, slopes
