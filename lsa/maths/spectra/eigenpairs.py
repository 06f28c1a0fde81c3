"""Eigenpairs at both ends of the spectrum of a symmetric operator, and how subspaces overlap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsa.maths.spectra.krylov import Krylov, Matvec, Ritz, gram_error
from lsa.runtime.errors import InputError
from lsa.runtime.progress import Report

CONFIRM = 3  # products that look for what was missed, see `lanczos`


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
    confirmed: bool  # the pairs have seen the products of a second, independent chain
    orthogonality: float  # max |V Vᵀ − I| over the final basis
    asymmetry: float  # max |T − Tᵀ| / max |T|: 0 for a symmetric operator in exact arithmetic

    @property
    def converged(self) -> bool:
        """Whether every pair met the tolerance and the set was confirmed."""
        pairs = torch.cat([self.largest.converged, self.smallest.converged])
        return self.confirmed and bool(pairs.all())

    def shortfall(self, name: str) -> list[str]:
        """A note for the reader when the pairs of the operator `name` have not converged."""
        if self.converged:
            return []
        worst = torch.cat([self.largest.residuals, self.smallest.residuals]).max()
        return [
            f"{name}: not converged in {self.products} products, a residual is still {worst:.3g}; "
            f"raise max_products={self.products} or tol"
        ]


def lanczos(
    matvec: Matvec,
    start: Tensor,
    *,
    rng: torch.Generator,
    largest: int = 1,
    smallest: int = 1,
    tol: float = 1e-3,
    floor: float = 0.01,
    confirm: int = CONFIRM,
    basis: int | None = None,
    max_products: int = 1000,
    report: Report | None = None,
) -> Extremes:
    """Eigenpairs A y = θ y at both ends of the spectrum, each to ‖A y − θ y‖ ≤ tol · |θ|.

    Lanczos with full reorthogonalisation and thick restart. What is guaranteed: Ritz values lie
    inside the spectrum (Cauchy interlacing), so λ_max is never overestimated, λ_min never
    underestimated, and within its residual of each θ lies *an* eigenvalue. That none further out
    was missed is a matter of probability: a random start contains every eigenvector, and to miss
    an isolated one its share must be orders below the typical 1/√d (Kuczyński & Woźniakowski
    1992). Two cases escape that argument, a start that is not random (eigenvectors of another
    checkpoint, say) and eigenvalues closer together than `tol`, of which one start vector shows
    a single copy. `confirm` is for them.

    Args:
        matvec: v `(d,)` ↦ A v `(d,)`, of any floating dtype.
        start: Start vector `(d,)`, or block `(d, b)`, which resolves eigenvalues of multiplicity
            up to b. Scale does not matter. Its dtype and device are those of the basis.
        rng: Source of the fresh directions that confirmation and breakdown need.
        largest: Pairs wanted at the upper end; 0 for none.
        smallest: Pairs wanted at the lower end; 0 for none.
        tol: Residual allowed, relative to max(|θ|, `floor` · ‖A‖). At 1e-3 the error of an
            isolated eigenvalue, at most residual²/gap, is far below any sampling error.
        floor: An eigenvalue below this share of the norm ‖A‖ (the largest |θ| seen) need only be
            as accurate as one of that size; without it the zero end of a positive semidefinite
            matrix would never converge. Tuned here.
        confirm: Once all pairs have converged, a random direction orthogonal to the basis starts
            a second chain, which takes so many further products; what they bring up must converge
            too. 3 are enough to expose an eigenvalue that was missed if it stands well clear of
            the unwanted ones (tuned here: 29 of 30 hidden on purpose in d = 20,000, where 2 found
            17 and 4 all; 60 of 72 with spectra of six small networks in d = 50,000, where 4 found
            69). 0 for a random start and a single pair, which do not need it.
        basis: Most vectors held, so memory is `basis` · d numbers. When it is full, restart from
            the Ritz vectors of both ends. Default 100, more if the pairs wanted need it.
        max_products: Give up after so many products; the flags then say what has not converged.
        report: Called as `report(products, max_products, text)` after every product.

    Returns:
        The pairs with residuals and convergence flags. Once the whole space has been spanned,
        which needs d ≤ `basis`, they are exact to rounding.

    Raises:
        InputError: Number of pairs, tolerance or basis out of range; a start that is zero or has
            dependent columns; a product of the wrong shape or not finite.
    """
    wanted = (largest, smallest)
    _check_options(tol, floor, confirm, max_products, sum(wanted))
    krylov = Krylov(start, _check_sizes(start, wanted, basis))
    left = None  # products that the converged pairs have yet to survive; None before that
    while True:
        krylov.multiply(matvec)
        ritz = krylov.ritz(wanted)
        allowed = tol * ritz.wanted.abs().clamp(min=floor * float(ritz.values.abs().max()))
        good = (ritz.residuals <= allowed) & (krylov.done >= sum(wanted))
        if report:
            report(krylov.products, max_products, ritz.describe())
        if left is not None:
            left -= 1
        elif good.all():
            left = confirm
        complete = krylov.done == krylov.d
        confirmed = complete or (left is not None and left <= 0)
        if complete or (confirmed and good.all()) or krylov.products == max_products:
            return _extremes(krylov, ritz, good, largest, confirmed)
        krylov.make_room(ritz, wanted)
        if left == confirm or krylov.done == krylov.count:
            krylov.append_random(rng)
        elif left is not None and left > 0:
            krylov.put_newest_first()


def top(
    matvec: Matvec,
    k: int,
    like: Tensor,
    *,
    rng: torch.Generator,
    near: Tensor | None = None,
    **options: Any,
) -> Extremes:
    """The k largest eigenpairs, from the start vector of `start_vector(like, rng, near)`.

    Args:
        matvec: As for `lanczos`, which `options` are of.
        k: Pairs wanted.
        like: As for `start_vector`.
        rng: For both.
        near: As for `start_vector`.
        **options: Of `lanczos`.
    """
    start = start_vector(like, rng, near)
    return lanczos(matvec, start, rng=rng, largest=k, smallest=0, **options)


def start_vector(like: Tensor, rng: torch.Generator, near: Tensor | None = None) -> Tensor:
    """Start vector `(d,)` for `lanczos`: random, or a direction plus a random vector as long.

    The random half makes a warm start as safe as a cold one but for a factor √2: an eigenvector
    orthogonal to the direction has its usual share of it. A smaller half saves no products (tuned
    here). For the Hessian of a loss the gradient is a good direction, because most of it lies in
    the top eigenspace (Gur-Ari et al. 2018, arXiv 1812.04754): on simple_cnn 17 products instead of
    19 to 22 for three pairs, 32 and 33 instead of 33 and 44 for both ends. For the covariance
    of the gradients it saves a tenth for one pair and nothing for five (177 for 197 products and
    580 for 586, at ten checkpoints of three networks from three random vectors each). Between
    checkpoints five epochs apart the eigenvectors of the other save about a tenth, more where they
    have settled, none right after the initial weights.

    Args:
        like: Any vector `(d,)` of the dtype and device wanted.
        rng: On the CPU; both kinds draw the same numbers.
        near: Direction `(d,)`, the gradient or a sum of the eigenvectors of a matrix nearby; one
            of zero length is none.

    Raises:
        InputError: A direction of another shape, or not finite.
    """
    random = torch.randn(len(like), generator=rng).to(like)
    if near is None:
        return random
    length = float(near.norm())
    if near.shape != like.shape or not length < float("inf"):
        raise InputError(
            f"the direction to start from has shape {tuple(near.shape)} and length {length:g}; "
            f"give a finite one of shape {tuple(like.shape)}, or none"
        )
    return random / random.norm() + near.to(like) / length if length else random


def subspace_overlap(U: Tensor, V: Tensor) -> float:
    """‖Uᵀ V‖_F² / k: mean squared cosine of the principal angles between two subspaces.

    1 when the smaller subspace lies within the other; max(k_U, k_V)/d on average for random ones.

    Args:
        U: Orthonormal columns, `(d, k_U)`.
        V: Orthonormal columns, `(d, k_V)`; k is the smaller of the two numbers of columns.

    Raises:
        InputError: Columns that are not orthonormal, or shapes that do not fit.
    """
    if U.ndim != 2 or V.ndim != 2 or len(U) != len(V):
        raise InputError(f"shapes {tuple(U.shape)} and {tuple(V.shape)}; give (d, k) and (d, l)")
    for matrix in (U, V):
        if not gram_error(matrix.T) < 1e-3:
            raise InputError("the columns are not orthonormal; take the Q of a QR decomposition")
    return float((U.T @ V.to(U)).double().square().sum()) / min(U.shape[1], V.shape[1])


def _extremes(krylov: Krylov, ritz: Ritz, good: Tensor, split: int, confirmed: bool) -> Extremes:
    vectors = krylov.vectors(ritz.S[:, ritz.ends])
    upper, lower = (
        Eigenpairs(ritz.wanted[part], vectors[:, part], ritz.residuals[part], good[part])
        for part in (slice(split), slice(split, None))
    )
    return Extremes(upper, lower, krylov.products, confirmed, *krylov.errors())


def _check_options(tol: float, floor: float, confirm: int, max_products: int, k: int) -> None:
    if not tol > 0:
        raise InputError(f"tol={tol} is not positive; choose a relative residual such as 1e-3")
    if not 0 <= floor <= 1:
        raise InputError(f"floor={floor} is no share of the norm; choose one between 0 and 1")
    if confirm < 0:
        raise InputError(f"confirm={confirm} is negative; choose 0 or more products")
    if max_products < k:
        raise InputError(f"max_products={max_products} cannot find {k} pairs; choose at least {k}")


def _check_sizes(start: Tensor, wanted: tuple[int, int], basis: int | None) -> int:
    """The number of basis vectors to hold."""
    if start.ndim not in (1, 2) or start.numel() == 0 or not start.is_floating_point():
        shape = tuple(start.shape)
        raise InputError(f"start has {start.dtype}, shape {shape}; give floats (d,) or (d, b)")
    d, block, k = len(start), start.numel() // len(start), sum(wanted)
    if min(wanted) < 0 or not 1 <= k <= d:
        raise InputError(f"largest={wanted[0]}, smallest={wanted[1]}; choose 1 to d={d} in all")
    if block > d:
        raise InputError(f"start has {block} columns; choose at most d={d}")
    least = min(d, k + block + 3)  # the pairs, a waiting row per chain, and a step to take
    if basis is None:
        basis = max(100, 2 * least)
    if basis < least:
        raise InputError(f"basis={basis} is too small for {k} pairs; choose at least {least}")
    return min(basis, d)
