"""Eigenpairs at both ends of the spectrum of a symmetric operator A, known only through v ↦ A v.

Lanczos with full reorthogonalisation and thick restart. One relation is kept throughout,

    A V[:done]ᵀ = V[:count]ᵀ T[:count, :done],

with orthonormal rows V of which the first `done` have been multiplied, and T the coefficients that
the orthogonalisation found. It serves blocks (several rows waiting to be multiplied, Ruhe 1979),
restarts (the rows become Ritz vectors) and breakdown (a fresh random row) alike, and it gives the
residual of every Ritz pair without a further product: the columns of T S − S Θ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lsa.errors import InputError

Matvec = Callable[[Tensor], Tensor]
"""v `(d,)` ↦ A v `(d,)`, A symmetric."""

Report = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Eigenpairs:
    """Ritz pairs (θ, y) of one end of the spectrum, the outermost first."""

    values: Tensor  # (k,) θ, float64 on the CPU
    vectors: Tensor  # (d, k) y, orthonormal columns, in the dtype and on the device of the start
    residuals: Tensor  # (k,) ‖A y − θ y‖, in the units of θ
    converged: Tensor  # (k,) bool: the residual is within the tolerance


@dataclass(frozen=True)
class Extremes:
    """Both ends of a spectrum, and what it took to find them."""

    largest: Eigenpairs  # algebraically largest, descending
    smallest: Eigenpairs  # algebraically smallest (most negative first), ascending
    products: int  # matrix-vector products spent
    confirmed: bool  # the products of a fresh random direction did not overturn the answer
    orthogonality: float  # max |V Vᵀ − I| over the final basis
    asymmetry: float  # max |T − Tᵀ| / max |T|: 0 for a symmetric operator in exact arithmetic

    @property
    def converged(self) -> bool:
        """Whether every pair met the tolerance and the set was confirmed."""
        pairs = torch.cat([self.largest.converged, self.smallest.converged])
        return self.confirmed and bool(pairs.all())


def lanczos(
    matvec: Matvec,
    start: Tensor,
    *,
    rng: torch.Generator,
    largest: int = 1,
    smallest: int = 1,
    tol: float = 1e-3,
    floor: float = 0.01,
    confirm: int = 2,
    basis: int | None = None,
    max_products: int = 1000,
    report: Report | None = None,
) -> Extremes:
    """Eigenpairs A y = θ y at both ends of the spectrum, each to ‖A y − θ y‖ ≤ tol · |θ|.

    What is guaranteed. Ritz values lie inside the spectrum (Cauchy interlacing): λ_max is never
    overestimated, λ_min never underestimated. Within each residual of θ lies *an* eigenvalue. That
    none further out was missed is a matter of probability: a random start contains every
    eigenvector, and missing an isolated one takes a component many orders below the typical 1/√d
    (Kuczyński & Woźniakowski 1992). `confirm` guards a start that is not random, such as the
    eigenvectors of another checkpoint. A repeated eigenvalue needs a start with as many columns.

    Args:
        matvec: v `(d,)` ↦ A v `(d,)`, of any floating dtype.
        start: Start vector `(d,)`, or block `(d, b)` to resolve eigenvalues of multiplicity up to
            b; scale does not matter. Its dtype and device are those of the basis.
        rng: Source of the fresh directions that confirmation and breakdown need.
        largest: Pairs wanted at the upper end; 0 for none.
        smallest: Pairs wanted at the lower end; 0 for none.
        tol: Residual allowed, relative to max(|θ|, `floor` · ‖A‖). 1e-3 puts the error of an
            isolated eigenvalue, at most residual²/gap, far below any sampling error.
        floor: An eigenvalue below this share of the norm ‖A‖ (the largest |θ| seen) need only be
            as accurate as one of that size; without it the zero end of a positive semidefinite
            matrix would never converge. Tuned here.
        confirm: Products from a fresh random direction, orthogonal to the basis, that a converged
            answer must survive; 2 expose a missed eigenvalue well outside the rest. Tuned here.
        basis: Most vectors held, so memory is `basis` · d numbers; when full the basis restarts
            from the Ritz vectors of both ends (Wu & Simon 2000). Default: 100, or more if that
            leaves no room for the pairs wanted.
        max_products: Give up after so many products; the result then says what has not converged.
        report: Called as `report(products, max_products, text)` after every product.

    Returns:
        The pairs with residuals and convergence flags. When d ≤ `basis` and the whole space has
        been spanned, the pairs are exact to rounding.

    Raises:
        InputError: Wanted pairs, tolerance or basis out of range; a zero or dependent start; a
            product of the wrong shape or not finite.
    """
    d, block = _check_start(start)
    _check_options(d, largest, smallest, tol, floor, confirm, max_products)
    basis = _check_basis(basis, d, block, largest + smallest)
    krylov = _Krylov(start.reshape(d, -1), rng, basis)
    left = None  # confirming products still to do; None while not converged
    for product in range(1, max_products + 1):
        krylov.multiply(matvec, newest=left is not None)
        ritz = krylov.ritz(largest, smallest, tol, floor)
        if report:
            report(product, max_products, ritz.text())
        left = None if not ritz.converged else confirm if left is None else left - 1
        if left == 0 or krylov.done == d or product == max_products:
            break
        krylov.make_room(largest, smallest)
        if krylov.done == krylov.count or left == confirm:
            krylov.append_random(rng)
    confirmed = left == 0 or krylov.done == d
    return krylov.extremes(ritz, largest, confirmed)
