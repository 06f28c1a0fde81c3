"""Slopes ∇ℓᵢ(θ)·u of independent samples, with their losses and outputs, from one pass.

Each function takes `both`, θ `(d,)` ↦ losses `(n,)` and outputs `(n, …)`, with θ and u `(d,)`, and
returns losses, outputs and slopes `(n,)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from lsa.landscape.derivatives import jacobians, sample_gradients

Both = Callable[[Tensor], tuple[Tensor, Any]]


def by_any_way(both: Both, theta: Tensor, u: Tensor) -> tuple[Tensor, Any, Tensor]:
    """Slopes by forward mode; where an operation lacks it, by a graph; else by single gradients."""
    try:
        return by_forward_mode(both, theta, u)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):
        with torch.no_grad():
            values, outputs = both(theta.detach())
        return values, outputs, jacobians.jacobian(lambda t: both(t)[0], theta).push(u)


def by_single_gradients(both: Both, theta: Tensor, u: Tensor) -> tuple[Tensor, Any, Tensor]:
    """Slopes by a backward pass for each sample, for networks that have no other right way."""
    with torch.no_grad():
        values, outputs = both(theta.detach())
    rows = sample_gradients.rows_one_by_one(lambda t: both(t)[0], theta, 1)
    return values, outputs, torch.cat([row @ u for row in rows])


def by_forward_mode(both: Both, theta: Tensor, u: Tensor) -> tuple[Tensor, Any, Tensor]:
    """Slopes by the derivative of every operation along u.

    Raises:
        RuntimeError: An operation has none.
    """
    pushed: Any = jvp(both, (theta.detach(),), (u,), has_aux=True)
    losses, slopes, outputs = pushed
    # Forward mode makes float64 of a Python number times a tensor without dimensions.
    return losses, outputs, slopes.to(losses.dtype)
