"""The top of the Hessian's spectrum, carried on from measurement to measurement."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lsa.landscape import Landscape
from lsa.maths.spaces import LOCAL, Space
from lsa.maths.spectra.carried import Top, top
from lsa.training import stability
from lsa.training.preconditioners import Preconditioner

log = logging.getLogger("lsa.watch")

TOL = 0.01  # error allowed, relative to the eigenvalue, as far as the search tells it
FIRST, LATER = 30, 7  # products at most, of the first search and of those that carry it on

Matvec = Callable[[Tensor], Tensor]


class Point:
    """The operators at one θ, and what was found of their spectra.

    Args:
        hessian: v ↦ H v.
        gradient: ∇L, computed where it is needed.
        update: The step that led to θ: unstable steps are along the top eigenvector.
        space: Where vectors live.
    """

    def __init__(
        self,
        hessian: Matvec,
        gradient: Callable[[], Tensor],
        update: Tensor,
        space: Space = LOCAL,
    ) -> None:
        self.hessian, self.gradient, self.update, self.space = hessian, gradient, update, space
        self.tops: dict[str, Top] = {}


class Spectrum:
    """λ_max(H), and λ_max(P⁻¹(H + λI)) over the threshold of the optimizer.

    A search goes on from the vectors of the last one (`lsa.maths.spectra.carried`), which takes 4
    products where little has changed and 7 at most; what they leave open is in the residual. It
    holds up to 16 vectors like θ.
    """

    def __init__(self) -> None:
        self._vectors: dict[str, Tensor] = {}
        self._rng = torch.Generator().manual_seed(0)
        self._said = False

    def lambda_max(self, point: Point) -> Mapping[str, float]:
        """λ_max(H) with its residual."""
        raw = self._top("raw", point.hessian, point)
        return {"lambda_max": raw.value, "lambda_max_residual": raw.residual}

    def sharpness(
        self, point: Point, theta: Tensor, state: stability.OptimizerState | None
    ) -> Mapping[str, float]:
        """λ_max(P⁻¹(H + λI)) with its residual, and as a share of the threshold.

        λ_max(H) where P is not known, with a line that says so, and as well where P is 1.

        Args:
            point: Where.
            theta: θ.
            state: The optimizer that moves all of θ; None where there are several.
        """
        P = None if state is None else state.preconditioner(theta)
        if state is None or P is None:
            self._say("several optimizers move the weights" if state is None else state.reason)
            return self.lambda_max(point)
        measured: dict[str, float] = {}
        if state.identity:
            measured |= self.lambda_max(point)
            raw = point.tops["raw"]
            felt = replace(raw, value=raw.value + float(state.penalty))
        else:
            felt = self._top("felt", _felt(point.hessian, P, state.penalty), point)
        measured |= {"sharpness": felt.value, "sharpness_residual": felt.residual}
        threshold = state.threshold
        if threshold is not None:
            measured |= {"threshold": threshold[0], "threshold_ratio": felt.value / threshold[0]}
        return measured

    def _say(self, reason: str) -> None:
        """Say once why there is no preconditioner."""
        if not self._said:
            log.warning("watch: lambda_max is measured in place of sharpness: %s", reason)
        self._said = True

    def _top(self, name: str, matvec: Matvec, point: Point) -> Top:
        """The top of an operator, from that of the last measurement or from the gradient."""
        if name in point.tops:
            return point.tops[name]
        carried, update, space = self._vectors.get(name), point.update, point.space
        first = carried is None
        if carried is None:
            drawn = [space.normal(update, self._rng) for _ in "12"]
            carried = torch.stack([point.gradient(), *drawn])
        fresh = space.normal(update, self._rng)
        length = float(space.length(update))
        if length > 0:
            fresh += update * (float(space.length(fresh)) / length)
        limit = FIRST if first else LATER
        result = top(matvec, carried, fresh, tol=TOL, max_products=limit, first=first, space=space)
        self._vectors[name], point.tops[name] = result.vectors, result
        return result


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
    measured = {"batch_sharpness": each.mean().item()}
    if len(each) > 1:
        measured["batch_sharpness_se_data"] = each.std().item() / math.sqrt(len(each))
    return measured


def _felt(hessian: Matvec, P: Preconditioner, penalty: float | Tensor) -> Matvec:
    """v ↦ P^(−½)(H + λI)P^(−½)v.

    In the precision of v where P is its diagonal: what that rounds is far below the residual.
    """
    if P.diagonal_alone:
        root: dict[torch.dtype, Tensor] = {}

        def product(v: Tensor) -> Tensor:
            if v.dtype not in root:
                root[v.dtype] = P.diagonal.rsqrt().to(v.dtype)
            w = root[v.dtype] * v
            Hw = hessian(w)
            plain = isinstance(penalty, float) and not penalty
            return root[v.dtype] * (Hw if plain else Hw + penalty * w)

        return product

    def turned(v: Tensor) -> Tensor:
        w = P.inverse_root(v.double())
        return P.inverse_root(hessian(w.to(v.dtype)) + penalty * w).to(v.dtype)

    return turned
