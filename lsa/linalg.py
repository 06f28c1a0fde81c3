"""Eigenpairs at both ends of the spectrum of a symmetric operator A, known only through v ↦ A v.

Lanczos with full reorthogonalisation and thick restart. One relation is kept throughout,

    A V[:done]ᵀ = V[:count]ᵀ T[:count, :done],

with orthonormal rows V, the first `done` of them multiplied and the others waiting, and T the
coefficients that the orthogonalisation found. It serves blocks (several rows wait; Ruhe 1979),
restarts (the rows become Ritz vectors; Wu & Simon 2000) and breakdown (a fresh random row) alike,
and gives the residual of every Ritz pair for no further product: the columns of T S − S Θ.
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
    confirmed: bool  # a second, independent chain of products did not overturn the values
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
    confirm: int = 5,
    basis: int | None = None,
    max_products: int = 1000,
    report: Report | None = None,
) -> Extremes:
    """Eigenpairs A y = θ y at both ends of the spectrum, each to ‖A y − θ y‖ ≤ tol · |θ|.

    What is guaranteed. Ritz values lie inside the spectrum (Cauchy interlacing): λ_max is never
    overestimated, λ_min never underestimated. Within its residual of each θ lies *an* eigenvalue.
    That none further out was missed is a matter of probability: a random start contains every
    eigenvector, and to miss an isolated one its share must be orders below the typical 1/√d
    (Kuczyński & Woźniakowski 1992). Two cases escape that argument, a start that is not random
    (eigenvectors of another checkpoint, say) and eigenvalues closer together than `tol`, of which
    one start vector shows a single copy. `confirm` is for them.

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
        confirm: After convergence a random direction orthogonal to the basis starts a second
            chain; the values must stay, to `tol`, while both chains take so many products in all.
            5 give the new chain 3, enough to expose an eigenvalue that was missed if it stands
            out of the unwanted ones (tuned here: at least 29 of 30 hidden on purpose, d = 20,000).
            0 for a random start and a single pair, where it is not needed.
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
    krylov = _Krylov(start, _check_sizes(start, wanted, basis))
    trial, left = None, 0  # converged values on trial, and the products they have yet to survive
    while True:
        krylov.multiply(matvec)
        ritz = krylov.ritz(wanted)
        allowed = tol * ritz.wanted.abs().clamp(min=floor * float(ritz.values.abs().max()))
        good = (ritz.residuals <= allowed) & (krylov.done >= sum(wanted))
        if report:
            report(krylov.products, max_products, ritz.describe())
        left -= 1
        if trial is not None and ((ritz.wanted - trial).abs() > allowed).any():
            trial = None
        if trial is None and good.all():
            trial, left = ritz.wanted, confirm
        complete = krylov.done == krylov.d
        confirmed = complete or (trial is not None and left <= 0)
        if complete or (confirmed and good.all()) or krylov.products == max_products:
            return _extremes(krylov, ritz, good, largest, confirmed)
        krylov.make_room(ritz, wanted)
        if (trial is not None and left == confirm) or krylov.done == krylov.count:
            krylov.append_random(rng)


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
        if not _gram_error(matrix.T) < 1e-3:
            raise InputError("the columns are not orthonormal; take the Q of a QR decomposition")
    return float((U.T @ V.to(U)).double().square().sum()) / min(U.shape[1], V.shape[1])


def orthogonalise(w: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """w − VᵀVw for orthonormal rows V `(j, d)`, and the coefficients Vw `(j,)`.

    Classical Gram–Schmidt, twice: that is enough (Giraud, Langou & Rozložník 2005).
    """
    first = V @ w
    w = torch.addmv(w, V.T, first, alpha=-1)
    second = V @ w
    return torch.addmv(w, V.T, second, alpha=-1), first + second


def apply(matvec: Matvec, v: Tensor) -> Tensor:
    """A v in the dtype of v; refuses a product of another shape."""
    w = matvec(v).detach()
    if w.shape != v.shape:
        raise InputError(f"matvec returned {tuple(w.shape)} for {tuple(v.shape)}; return A v")
    return w.to(v)


def to_host(coefficients: Tensor) -> Tensor:
    """Coefficients as float64 on the CPU; refuses an operator that overflowed or returned nan."""
    coefficients = coefficients.double().cpu()
    if not bool(coefficients.isfinite().all()):
        raise InputError("the product A v is not finite; the loss has diverged at this θ")
    return coefficients


def _gram_error(V: Tensor) -> float:
    gram = (V @ V.T).double().cpu()
    return float((gram - torch.eye(len(V), dtype=gram.dtype)).abs().max())


@dataclass(frozen=True)
class _Ritz:
    """All Ritz values of the rows multiplied so far, and the residuals of the wanted ones."""

    values: Tensor  # (m,) ascending
    S: Tensor  # (m, m) eigenvectors of the projected matrix
    ends: Tensor  # indices of the wanted ones: the upper end descending, the lower ascending
    residuals: Tensor  # ‖T s − θ s‖ of the wanted ones

    @property
    def wanted(self) -> Tensor:
        return self.values[self.ends]

    def describe(self) -> str:
        low, high = float(self.values[0]), float(self.values[-1])
        return f"λ {low:.4g} … {high:.4g}, worst residual {float(self.residuals.max()):.1e}"


class _Krylov:
    """The relation A V[:done]ᵀ = V[:count]ᵀ T[:count, :done] of this module's docstring."""

    def __init__(self, start: Tensor, basis: int) -> None:
        columns = start.detach().reshape(len(start), -1)
        self.d, self.block = columns.shape
        self.basis = basis
        self.V = columns.new_empty(min(basis, max(16, 2 * self.block)), self.d)
        self.T = torch.zeros(basis, basis, dtype=torch.float64)
        self.done = self.count = self.products = 0
        self.asymmetry = self.scale = 0.0
        for column in columns.T:
            self._append_start(column)

    def multiply(self, matvec: Matvec) -> None:
        """Multiply the row that has waited longest; append what is new in the product."""
        j, n = self.done, self.count
        w, c = orthogonalise(apply(matvec, self.V[j]), self.V[:n])
        c = to_host(torch.cat([c, torch.linalg.vector_norm(w)[None]]))  # the only synchronisation
        self.T[:n, j] = c[:n]
        self.done, self.products = j + 1, self.products + 1
        self.scale = max(self.scale, float(c.abs().max()))
        if n < self.d and c[n] > 10 * torch.finfo(w.dtype).eps * self.scale:
            self.T[n, j] = c[n]
            self._append(w / float(c[n]))

    def ritz(self, wanted: tuple[int, int]) -> _Ritz:
        """Diagonalise the symmetric part of T; what T lacks of symmetry stays in the residuals."""
        m, n = self.done, self.count
        values, S = torch.linalg.eigh((self.T[:m, :m] + self.T[:m, :m].T) / 2)
        index = torch.arange(m)
        ends = torch.cat([index.flip(0)[: wanted[0]], index[: wanted[1]]])
        R = self.T[:n, :m] @ S[:, ends]
        R[:m] -= S[:, ends] * values[ends]
        return _Ritz(values, S, ends, R.norm(dim=0))

    def make_room(self, ritz: _Ritz, wanted: tuple[int, int]) -> None:
        """Restart from the Ritz vectors of both ends when the next two rows would not fit."""
        m, n = self.done, self.count
        if self.basis == self.d or n + 2 <= self.basis:
            return
        room = min(self.basis // 2, self.basis - 2 - (n - m))
        S = ritz.S[:, _both_ends(m, max(room, sum(wanted)), wanted)]
        k = S.shape[1]
        self._note_asymmetry()
        T = torch.zeros_like(self.T)
        T[:k, :k] = S.T @ self.T[:m, :m] @ S
        T[k : k + n - m, :k] = self.T[m:n, :m] @ S
        self.T, self.done, self.count = T, k, k + n - m
        self.V[: self.count] = torch.cat([S.T.to(self.V) @ self.V[:m], self.V[m:n]])

    def append_random(self, rng: torch.Generator) -> None:
        """Put a random row first in the queue, unless an earlier one has a chain there."""
        if self.count == self.d or self.count - self.done > self.block:
            return
        w = torch.randn(self.d, generator=rng, device=rng.device).to(self.V)
        for _ in range(2):  # what is left of w is short when the basis nearly spans the space
            w, _ = orthogonalise(w / torch.linalg.vector_norm(w), self.V[: self.count])
        self._append(w / torch.linalg.vector_norm(w))
        order = [self.count - 1, *range(self.done, self.count - 1)]
        self.V[self.done : self.count] = self.V[order]
        self.T[self.done : self.count] = self.T[order]

    def vectors(self, S: Tensor) -> Tensor:
        """Ritz vectors `(d, k)`."""
        return self.V[: self.done].T @ S.to(self.V)

    def errors(self) -> tuple[float, float]:
        """Loss of orthogonality of the basis, and asymmetry of the operator."""
        self._note_asymmetry()
        return _gram_error(self.V[: self.count]), self.asymmetry

    def _append(self, row: Tensor) -> None:
        if self.count == len(self.V):
            more = min(self.basis, 2 * self.count) - self.count
            self.V = torch.cat([self.V, self.V.new_empty(more, self.d)])
        self.V[self.count] = row
        self.count += 1

    def _append_start(self, column: Tensor) -> None:
        column = column / torch.linalg.vector_norm(column)
        w, _ = orthogonalise(column, self.V[: self.count])
        left = torch.linalg.vector_norm(w)
        if not left > 1e3 * torch.finfo(w.dtype).eps:
            raise InputError(
                "start is zero, not finite or has dependent columns; draw it at random"
            )
        w, _ = orthogonalise(w / left, self.V[: self.count])
        self._append(w / torch.linalg.vector_norm(w))

    def _note_asymmetry(self) -> None:
        T = self.T[: self.done, : self.done]
        if self.scale > 0:
            self.asymmetry = max(self.asymmetry, float((T - T.T).abs().max()) / self.scale)


def _both_ends(m: int, keep: int, wanted: tuple[int, int]) -> Tensor:
    """Indices of `keep` out of m ascending values: the wanted ends and their neighbours."""
    largest, smallest = wanted
    extra = keep - largest - smallest
    low = 0 if smallest == 0 else extra if largest == 0 else extra // 2
    index = torch.arange(m)
    return torch.cat([index[: smallest + low], index[m - largest - (extra - low) :]])


def _extremes(krylov: _Krylov, ritz: _Ritz, good: Tensor, split: int, confirmed: bool) -> Extremes:
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
        raise InputError(f"largest={wanted[0]}, smallest={wanted[1]}: choose 1 to d={d} pairs")
    if block > d:
        raise InputError(f"start has {block} columns; choose at most d={d}")
    least = min(d, k + block + 3)  # the pairs, a waiting row per chain, and a step to take
    if basis is None:
        basis = max(100, 2 * least)
    if basis < least:
        raise InputError(f"basis={basis} is too small for {k} pairs; choose at least {least}")
    return min(basis, d)
