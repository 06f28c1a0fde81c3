"""The top of the Hessian's spectrum, carried on from measurement to measurement."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from lsa.landscape import Landscape
from lsa.maths.spaces import HERE, Space
from lsa.maths.spectra.carried import Top, top
from lsa.training import stability
from lsa.training.preconditioners import Preconditioner

TOL = 0.01  # residual allowed, relative to the eigenvalue
FIRST, LATER = 30, 7  # products at most, of the first search and of those that carry it on

Matvec = Callable[[Tensor], Tensor]


class Spectrum:
    """λ_max(H), and λ_max(P⁻¹(H + λI)) over the threshold of the optimizer.

    A search goes on from the vectors of the last one (`lsa.maths.spectra.carried`), which takes 3
    products where little has changed and 7 at most; what they leave open is in the residual. It
    holds up to 16 vectors like θ.
    """

    def __init__(self) -> None:
        self._vectors: dict[str, Tensor] = {}
        self._rng = torch.Generator().manual_seed(0)

    def measure(
        self, landscape: Landscape, theta: Tensor, update: Tensor, optimizer: Optimizer | None
    ) -> Mapping[str, float]:
        """Eigenvalues with their residuals, and the share of the threshold.

        Args:
            landscape: L.
            theta: Where.
            update: The step that led there: unstable steps are along the top eigenvector.
            optimizer: The one that moves all of θ; None where there are several.
        """
        hessian = landscape.hessian(theta)
        raw = self._top("raw", hessian, update, lambda: landscape.gradient(theta))
        found = _named(raw)
        if optimizer is None:
            return found
        state = stability.read(optimizer, landscape.own_parameters)
        P, penalty = state.preconditioner(theta), state.penalty
        if P is None:
            return found
        if state.identity:
            felt = replace(raw, value=raw.value + float(penalty))
        else:
            felt = self._top(
                "felt", _felt(hessian, P, penalty), update, lambda: landscape.gradient(theta)
            )
        found |= {"sharpness": felt.value, "sharpness_residual": felt.residual}
        threshold = state.threshold
        if threshold is not None:
            found |= {"threshold": threshold[0], "threshold_ratio": felt.value / threshold[0]}
        return found

    def of_hessian(
        self, hessian: Matvec, update: Tensor, gradient: Callable[[], Tensor], space: Space
    ) -> Mapping[str, float]:
        """λ_max(H) alone, of vectors that processes may share."""
        return _named(self._top("raw", hessian, update, gradient, space))

    def _top(
        self,
        name: str,
        matvec: Matvec,
        update: Tensor,
        gradient: Callable[[], Tensor],
        space: Space = HERE,
    ) -> Top:
        """The top of an operator, from that of the last measurement or from the gradient."""
        carried = self._vectors.get(name)
        limit = LATER
        if carried is None:
            limit = FIRST
            carried = torch.stack([gradient(), *(space.normal(update, self._rng) for _ in "12")])
        fresh = space.normal(update, self._rng)
        length = float(space.length(update))
        if length > 0:
            fresh += update * (float(space.length(fresh)) / length)
        found = top(matvec, carried, fresh, tol=TOL, max_products=limit, space=space)
        self._vectors[name] = found.vectors
        return found


def _named(raw: Top) -> dict[str, float]:
    return {"lambda_max": raw.value, "lambda_max_residual": raw.residual}


def batch_sharpness(landscapes: list[Landscape], theta: Tensor) -> Mapping[str, float]:
    """Mean of g_BᵀH_B g_B/|g_B|² over batches, with the standard error over them.

    (Andreyev & Beneventano 2024, arXiv 2412.20553; here in evaluation mode.)
    """
    values = []
    for batch in landscapes:
        g = batch.gradient(theta).double()
        if (square := g @ g) > 0:
            values.append((g @ batch.hessian(theta)(g.to(theta.dtype)).double()) / square)
    if not values:
        return {}
    each = torch.stack(values)
    found = {"batch_sharpness": each.mean().item()}
    if len(each) > 1:
        found["batch_sharpness_se_data"] = each.std().item() / math.sqrt(len(each))
    return found


def _felt(hessian: Matvec, P: Preconditioner, penalty: float | Tensor) -> Matvec:
    """v ↦ P^(−½)(H + λI)P^(−½)v."""

    def product(v: Tensor) -> Tensor:
        w = P.inverse_root(v.double())
        return P.inverse_root(hessian(w.to(v.dtype)) + penalty * w).to(v.dtype)

    return product
