"""Eigenpairs at both ends of the spectrum of a symmetric operator.

An eigenvalue may be missed. So, once all pairs of `lanczos` have converged, a random direction
orthogonal to the basis starts another chain of products. If it changes a wanted eigenvalue, the
search goes on until all have converged again, and the next random direction follows. The search
ends with the first random direction that changes none. At a loose tolerance the missed eigenvector
may be about to show in the residual, to which random directions are orthogonal. So two products
along the residual come first.

How sure the upper end is depends on the start. After a start that is random, or partly so, no
eigenvalue lies above `Extremes.limit`, with a probability of 95 % (`detection.excluded`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lsa.maths.spaces import LOCAL, Space
from lsa.maths.spectra.detection import excluded
from lsa.maths.spectra.krylov import Krylov, Matvec
from lsa.maths.spectra.measured import Measured
from lsa.maths.spectra.search import Search
from lsa.runtime.errors import InputError, NotFinite
from lsa.runtime.progress import Report

# At a loose tolerance the residual may be small enough at the second eigenvalue before the first
# shows. So products along the residual come before each random direction, two above a tolerance of
# 1e-3. Tuned here: of 3,000 random starts on a spectrum with eigenvalues 0.157 and 0.099, 26 ended
# on the second at 5 %, 18 with random directions alone, and 3 with both; at 1 % 1, and then none.
LOOSE, ON = 1e-3, 2
CONFIRM, SHARE = 3, 0.1  # products that look for missed eigenvalues, see `lanczos`
FURTHER = 12  # measured products at most beside those with the pairs themselves


@dataclass(frozen=True)
class Eigenpairs:
    """Ritz pairs (θ, y) of one end of the spectrum, the outermost first."""

    values: Tensor  # (k,) θ, float64 on the CPU
    vectors: Tensor  # (d, k) y, orthonormal columns, in the dtype and on the device of the start
    residuals: Tensor  # (k,) ‖A y − θ y‖, in the units of θ
    converged: Tensor  # (k,) bool: the residual is within the tolerance
    known: Tensor  # (k,) bool: |θ| exceeds its residual, or is as small as an eigenvalue 0 leaves


@dataclass(frozen=True)
class Extremes:
    """Both ends of a spectrum, what the search cost and how sure it is."""

    largest: Eigenpairs  # algebraically largest, descending
    smallest: Eigenpairs  # algebraically smallest (most negative first), ascending
    products: int  # matrix-vector products spent
    confirmed: bool  # the last random direction changed no wanted eigenvalue
    rounding: float  # an eigenvalue of this size or less is zero within rounding
    orthogonality: float  # max |V Vᵀ − I| over the final basis
    asymmetry: float  # max |T − Tᵀ| / max |T|: 0 for a symmetric operator in exact arithmetic
    noise: float = 0.0  # error of the products, which the residuals contain
    limit: float = math.inf  # no eigenvalue is larger, with a probability of 95 %; inf: not known

    @property
    def converged(self) -> bool:
        """Whether every pair met the tolerance, is known, and the set was confirmed."""
        return self.settled and bool(torch.cat([self.largest.known, self.smallest.known]).all())

    @property
    def settled(self) -> bool:
        """Like `converged`, but residuals of eigenvalues near zero may exceed the tolerance."""
        pairs = torch.cat([self.largest.converged, self.smallest.converged])
        return self.confirmed and bool(pairs.all())

    def told_from_zero(self, smallest: bool = False) -> bool:
        """Whether the outermost eigenvalue of an end exceeds its residual and rounding."""
        pairs = self.smallest if smallest else self.largest
        return pairs.values[0].abs().item() > max(pairs.residuals[0].item(), self.rounding)

    def shortfall(self, name: str) -> list[str]:
        """A note for the reader when the pairs of the operator `name` have not converged."""
        if self.converged:
            return []
        ends = (self.largest, self.smallest)
        residuals, values, known = (
            torch.cat([getattr(end, field) for end in ends])
            for field in ("residuals", "values", "known")
        )
        if not self.settled:
            how = f"raise max_products={self.products} or tol"
            if self.noise > 0:
                how = f"{self.noise:.1g} of it is the error of the products; raise tol"
            return [
                f"{name}: not converged in {self.products} products, a residual is still "
                f"{residuals.max():.3g}; {how}"
            ]
        worst = int(torch.where(known, -1.0, residuals).argmax())
        return [
            f"{name}: not converged, the eigenvalue {values[worst]:.3g} is not told from zero by "
            f"its residual of {residuals[worst]:.3g}; lower tol, or leave this end out"
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
    random: float = 0.0,
    space: Space = LOCAL,
    report: Report | None = None,
) -> Extremes:
    """Eigenpairs A y = θ y at both ends of the spectrum, each to ‖A y − θ y‖ ≤ tol · |θ|.

    Lanczos with full reorthogonalisation and thick restart. What is guaranteed: Ritz values lie
    inside the spectrum (Cauchy interlacing), so λ_max is never overestimated, λ_min never
    underestimated, and within its residual of each θ lies *an* eigenvalue. That none further out
    was missed is a matter of probability. A random start contains every eigenvector, and to miss
    an isolated one its share must be orders below the typical 1/√d (Kuczyński & Woźniakowski
    1992). Three cases escape that argument: a start that is not random, a loose tolerance (`ON`),
    and multiple eigenvalues, of which one start vector shows a single copy.

    Errors that products carry (`lsa.maths.spectra.measured`) are part of the residuals.

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
            matrix would never converge. Tuned here. A Ritz value beyond zero shows, by
            interlacing, that the end is beyond zero: the search then goes on until the residual is
            below |θ| as well. `known` is false where the residual stays above |θ|, unless θ is as
            small as an eigenvalue 0 would leave it.
        random: Share of the start's squared length that is a random direction: 1 for all of it, ¼
            for `start_vector` with a direction; 0 if unknown, and then there is no `limit`.
        confirm: Products of each random direction that looks for missed eigenvalues, at least; a
            tenth of all products where that is more (`SHARE`). 3 expose an eigenvalue that stands
            well clear of the unwanted ones (tuned here: 29 of 30 hidden on purpose in d = 20,000;
            60 of 72 with spectra of six small networks in d = 50,000, where 4 found 69); 0: none.
        basis: Most vectors held, so memory is `basis` · d numbers. When it is full, restart from
            the Ritz vectors of both ends. Default 100, more if the pairs wanted need it.
        max_products: Give up after so many products; the flags then say what has not converged.
        space: Of the vectors; where processes share them, each has a part of every one.
        report: Called as `report(products, max_products, text)` after every product.

    Returns:
        Pairs, residuals, flags; exact to rounding once the space is spanned, with d ≤ `basis`.

    Raises:
        InputError: Number of pairs, tolerance or basis out of range; a start that is zero or has
            dependent columns; a product of the wrong shape or not finite.
    """
    wanted = (largest, smallest)
    _check_options(tol, floor, confirm, max_products, sum(wanted))
    krylov = Krylov(start, _check_sizes(start, space, wanted, basis), space)
    search = Search(matvec, krylov, wanted, rng, tol, floor, max_products, report)
    search.converge()
    confirmed = not confirm and search.converged
    while not (confirmed or search.over):
        before = search.ritz.wanted
        search.go_on(ON if tol > LOOSE else 0)
        asked = search.ask_random_direction(max(confirm, int(SHARE * krylov.products)))
        search.converge()
        confirmed = asked and search.converged and not search.changed(before)
    extremes = _extremes(search, confirmed or krylov.done == krylov.d)
    if random and krylov.chain:
        above = excluded(krylov.chain, dimension=krylov.d, random=random)
        highest = float(search.ritz.values[-1])  # by a later chain, it may be more
        extremes = replace(extremes, limit=max(above, highest) + search.noise)
    return measured(extremes, search) if search.noise else extremes


def top(
    matvec: Matvec,
    k: int,
    like: Tensor,
    *,
    rng: torch.Generator,
    near: Tensor | None = None,
    space: Space = LOCAL,
    **options: Any,
) -> Extremes:
    """The k largest eigenpairs, from the start vector of `start_vector(like, rng, near)`.

    Args:
        matvec: v `(d,)` ↦ A v `(d,)`.
        k: Pairs wanted.
        like: Any vector `(d,)` of the dtype and device wanted.
        rng: Source of the start and of the random directions.
        near: Direction `(d,)` for the start, or None.
        space: Of the vectors.
        **options: Further options of `lanczos`.

    Raises:
        InputError: As `lanczos` and `start_vector`.
    """
    start = start_vector(like, rng, near, space)
    return lanczos(matvec, start, rng=rng, largest=k, smallest=0, space=space, **options)


def start_vector(
    like: Tensor, rng: torch.Generator, near: Tensor | None = None, space: Space = LOCAL
) -> Tensor:
    """Start vector `(d,)` for `lanczos`: random, or a direction plus a random vector as long.

    The random half keeps a start with a direction as safe as a random one, up to a factor √2: of an
    eigenvector orthogonal to the direction it contains the usual share. A shorter random half saves
    no products (tuned here).

    For the Hessian of a loss the gradient is a good direction, because most of it lies in the top
    eigenspace (Gur-Ari et al. 2018, arXiv 1812.04754). On simple_cnn it took 17 products instead of
    19 to 22 for three pairs, and 32 and 33 instead of 33 and 44 for both ends. For the covariance
    of the gradients it saves a tenth for one pair and nothing for five (177 for 197 products and
    580 for 586, at ten checkpoints of three networks from three random vectors each). Eigenvectors
    of a checkpoint five epochs away save about a tenth; none right after the initial weights.

    Args:
        like: Any vector `(d,)` of the dtype and device wanted.
        rng: On the CPU; both kinds draw the same numbers.
        near: Direction `(d,)`: the gradient, or a sum of the eigenvectors of a matrix nearby. A
            direction of length zero counts as none.
        space: Of the vectors.

    Raises:
        InputError: A direction of another shape.
        NotFinite: A direction that is not finite.
    """
    random = space.normal(like, rng)
    if near is None:
        return random
    length = float(space.length(near))
    if near.shape != like.shape:
        raise InputError(
            f"the direction to start from has shape {tuple(near.shape)}; give one of shape "
            f"{tuple(like.shape)}, or none"
        )
    if not length < math.inf:
        raise NotFinite("the direction to start from is not finite; has the checkpoint diverged?")
    if not length:
        return random
    both = random / float(space.length(random)) + near.to(like) / length
    return both if float(space.length(both)) > 1e-3 else random  # d = 1: opposite ones cancel


def measured(extremes: Extremes, search: Search) -> Extremes:
    """The same pairs, refined with measured products whose error is part of the residuals.

    The residual that Lanczos computes does not contain the errors of its products. So the pairs are
    multiplied once more by `Measured` products, and the search goes on from them. It ends where
    residual and error together are within the tolerance, or where the residual is below the error.

    Args:
        extremes: Pairs of a search with products that carry an error estimate.
        search: That search; its basis is given up to make room.
    """
    best = Measured(search.matvec)
    start = torch.cat([extremes.largest.vectors, extremes.smallest.vectors], dim=1)
    k, old = start.shape[1], search.krylov
    size = min(old.basis, 2 * k + FURTHER)
    krylov = Krylov(start, max(size, min(old.d, 2 * k + 3)), old.space)
    old.V = old.V[:0]  # whose memory the new basis may need
    options = search.tol, search.floor, k + FURTHER, search.report
    again = Search(best, krylov, search.wanted, search.rng, *options)
    again.converge()
    better = _extremes(again, extremes.confirmed)
    ends = [
        replace(end, residuals=end.residuals + best.noise, converged=ok, known=known)
        for end, ok, known in zip(
            (better.largest, better.smallest),
            (again.ritz.residuals + best.noise <= again.allowed).split(search.wanted),
            again.known().split(search.wanted),
            strict=True,
        )
    ]
    return replace(
        extremes,
        largest=ends[0],
        smallest=ends[1],
        products=extremes.products + better.products,
        rounding=max(better.rounding, best.noise),
        noise=best.noise,
    )


def _extremes(search: Search, confirmed: bool) -> Extremes:
    krylov, ritz, split = search.krylov, search.ritz, search.wanted[0]
    vectors, known = krylov.vectors(ritz.S[:, ritz.ends]), search.known()
    upper, lower = (
        Eigenpairs(
            ritz.wanted[part],
            vectors[:, part],
            ritz.residuals[part],
            search.good[part],
            known[part],
        )
        for part in (slice(split), slice(split, None))
    )
    orthogonality, asymmetry = krylov.errors()
    return Extremes(
        upper,
        lower,
        products=krylov.products,
        confirmed=confirmed,
        rounding=max(search.eps, asymmetry) * float(ritz.values.abs().max()),
        orthogonality=orthogonality,
        asymmetry=asymmetry,
    )


def _check_options(tol: float, floor: float, confirm: int, max_products: int, k: int) -> None:
    if not tol > 0:
        raise InputError(f"tol={tol} is not positive; choose a relative residual such as 1e-3")
    if not 0 <= floor <= 1:
        raise InputError(f"floor={floor} is no share of the norm; choose one between 0 and 1")
    if confirm < 0:
        raise InputError(f"confirm={confirm} is negative; choose 0 or more products")
    if max_products < k:
        raise InputError(f"max_products={max_products} cannot find {k} pairs; choose at least {k}")


def _check_sizes(start: Tensor, space: Space, wanted: tuple[int, int], basis: int | None) -> int:
    """The number of basis vectors to hold."""
    if start.ndim not in (1, 2) or start.numel() == 0 or not start.is_floating_point():
        shape = tuple(start.shape)
        raise InputError(f"start has {start.dtype}, shape {shape}; give floats (d,) or (d, b)")
    d, block, k = space.dimension(start), start.numel() // len(start), sum(wanted)
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
