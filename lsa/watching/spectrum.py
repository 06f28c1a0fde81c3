"""The top of the Hessian's spectrum, carried on from measurement to measurement."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from lsa.landscape import Landscape
from lsa.maths.spectra.eigenpairs import Eigenpairs, lanczos
from lsa.training import stability
from lsa.training.preconditioners import Preconditioner

TOL = 0.02  # residual allowed, relative to the eigenvalue
FRESH = 0.3  # length of the random vector that a carried eigenvector is mixed with
CONFIRM = 2  # products along a random direction, for a top vector that has been overtaken
PRODUCTS = 30  # of one search at most

Matvec = Callable[[Tensor], Tensor]


class Spectrum:
    """λ_max(H), and λ_max(P⁻¹(H + λI)) over the threshold of the optimizer.

    A search starts from the eigenvector of the last measurement, mixed with a random vector, and
    goes on until the residual is small: while the top vector is being overtaken by another one, the
    value stands still before it jumps, so that standing still says nothing.
    """

    def __init__(self) -> None:
        self._vectors: dict[str, Tensor] = {}
        self._rng = torch.Generator().manual_seed(0)

    def measure(
        self, landscape: Landscape, theta: Tensor, optimizer: Optimizer | None
    ) -> Mapping[str, float]:
        """Eigenvalues with their residuals, and the share of the threshold.

        Args:
            landscape: L.
            theta: Where.
            optimizer: The one that moves all of θ; None where there are several.
        """
        hessian = landscape.hessian(theta)
        raw = self._top("raw", hessian, theta, landscape)
        found = _named("lambda_max", raw)
        if optimizer is None:
            return found
        state = stability.read(optimizer, landscape.own_parameters)
        P, penalty = state.preconditioner(theta), state.penalty
        if P is None:
            return found
        if state.identity:
            value, residual = raw.values[0].item() + float(penalty), raw.residuals[0].item()
        else:
            pairs = self._top("felt", _felt(hessian, P, penalty), theta, landscape)
            value, residual = pairs.values[0].item(), pairs.residuals[0].item()
        found |= {"sharpness": value, "sharpness_residual": residual}
        threshold = state.threshold
        if threshold is not None:
            found |= {"threshold": threshold[0], "threshold_ratio": value / threshold[0]}
        return found

    def _top(self, name: str, matvec: Matvec, theta: Tensor, landscape: Landscape) -> Eigenpairs:
        random = torch.randn(len(theta), generator=self._rng).to(theta)
        random /= random.norm()
        carried = self._vectors.get(name)
        if carried is None:
            gradient = landscape.gradient(theta)
            length = float(gradient.norm())
            carried = gradient / length if length > 0 else random
            start = carried + random
        else:
            start = carried + FRESH * random
        found = lanczos(
            matvec,
            start,
            rng=self._rng,
            largest=1,
            smallest=0,
            tol=TOL,
            confirm=CONFIRM,
            max_products=PRODUCTS,
        ).largest
        self._vectors[name] = found.vectors[:, 0]
        return found


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


def _named(name: str, pairs: Eigenpairs) -> dict[str, float]:
    return {name: pairs.values[0].item(), f"{name}_residual": pairs.residuals[0].item()}
