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

CLEAR = False
FIFO = False
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
    wanted = (largest, smallest)
    basis = _check_options(d, block, wanted, tol, floor, confirm, max_products, basis)
    krylov = _Krylov(start.detach().reshape(d, block), basis)
    left = None  # confirming products still to do; None while not converged
    row = 0  # which of the waiting rows is multiplied next
    while True:
        krylov.multiply(matvec, row)
        ritz = krylov.ritz(largest, smallest)
        good = ritz.within(tol, floor)
        left = None if not good.all() else confirm if left is None else left - 1
        if report:
            report(krylov.products, max_products, ritz.describe())
        if left == 0 or krylov.done == d or krylov.products == max_products:
            return _extremes(krylov, ritz, good, largest, left == 0 or krylov.done == d)
        krylov.make_room(ritz, largest, smallest)
        if left == confirm or not krylov.waiting:
            krylov.append_random(rng)
        row = 0 if left in (None, confirm) or FIFO else ritz.loosest


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


def orthogonalise(w: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """w − VᵀVw for orthonormal rows V `(j, d)`, and the coefficients Vw `(j,)`.

    Classical Gram–Schmidt, twice: once more is enough (Giraud, Langou & Rozložník 2005).
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


def gram_error(V: Tensor) -> float:
    """max |V Vᵀ − I|: how far the rows of V are from orthonormal."""
    gram = (V @ V.T).double()
    return float((gram - torch.eye(len(V), device=V.device)).abs().max())


@dataclass(frozen=True)
class _Ritz:
    """All Ritz values of the current basis, and the residuals of the wanted ones."""

    values: Tensor  # (m,) ascending
    S: Tensor  # (m, m) eigenvectors of the projected matrix
    ends: Tensor  # indices of the wanted ones: the upper end descending, then the lower ascending
    residuals: Tensor  # of the wanted ones
    loosest: int  # the waiting row that contributes least to those residuals
    complete: bool  # as many as are wanted

    def within(self, tol: float, floor: float) -> Tensor:
        scale = self.values[self.ends].abs().clamp(min=floor * float(self.values.abs().max()))
        return (self.residuals <= tol * scale) & self.complete

    def describe(self) -> str:
        low, high = float(self.values[0]), float(self.values[-1])
        return f"λ {low:.4g} … {high:.4g}, worst residual {float(self.residuals.max()):.1e}"


class _Krylov:
    """The relation A V[:done]ᵀ = V[:count]ᵀ T[:count, :done] of this module's docstring."""

    def __init__(self, start: Tensor, basis: int) -> None:
        self.d, self.block = start.shape
        self.basis = basis
        self.V = start.new_empty(min(basis, max(16, 2 * self.block)), self.d)
        self.T = torch.zeros(basis, basis, dtype=torch.float64)
        self.done = self.count = self.products = 0
        self.asymmetry = self.scale = 0.0
        for column in start.T:
            self._append_start(column)

    @property
    def waiting(self) -> int:
        return self.count - self.done

    def multiply(self, matvec: Matvec, row: int) -> None:
        """Multiply a waiting row and append what is new in the product."""
        j, n = self.done, self.count
        if row:
            self.V[[j, j + row]] = self.V[[j + row, j]]
            self.T[[j, j + row]] = self.T[[j + row, j]]
        w, c = orthogonalise(apply(matvec, self.V[j]), self.V[:n])
        c = to_host(torch.cat([c, torch.linalg.vector_norm(w)[None]]))  # the only synchronisation
        self.T[:n, j] = c[:n]
        self.done, self.products = j + 1, self.products + 1
        self.scale = max(self.scale, float(c.abs().max()))
        if n < self.d and c[n] > 10 * torch.finfo(w.dtype).eps * self.scale:
            self.T[n, j] = c[n]
            self._append(w / c[n].to(w))

    def ritz(self, largest: int, smallest: int) -> _Ritz:
        """Ritz values of the rows multiplied so far; residuals ‖T s − θ s‖ of the wanted ones."""
        m, n = self.done, self.count
        values, S = torch.linalg.eigh((self.T[:m, :m] + self.T[:m, :m].T) / 2)
        index = torch.arange(m)
        ends = torch.cat([index.flip(0)[:largest], index[:smallest]])
        R = self.T[:n, :m] @ S
        R[:m] -= S * values
        loosest = int(R[m:, ends].norm(dim=1).argmin()) if n > m else 0
        r = R.norm(dim=0)
        clear=True
        if m>largest+smallest:
            rest = slice(smallest, m - largest)
            t = 1e-3
            if largest: 
                k=values[m-largest]
                clear &= bool(((values+r)[rest] <= k + t*abs(k)).all())
            if smallest:
                k=values[smallest-1]
                clear &= bool(((values-r)[rest] >= k - t*max(abs(k),0.01*float(values.abs().max()))).all())
        return _Ritz(values, S, ends, r[ends], loosest, complete=m >= largest + smallest and (clear or not CLEAR))

    def make_room(self, ritz: _Ritz, largest: int, smallest: int) -> None:
        """Restart from the Ritz vectors of both ends when the next two rows would not fit."""
        m, waiting = self.done, self.waiting
        if self.basis >= self.d or self.count + 2 <= self.basis:
            return
        room = min(self.basis // 2, self.basis - waiting - 2)
        S = ritz.S[:, _both_ends(m, max(room, largest + smallest), largest, smallest)]
        k = S.shape[1]
        self._note_asymmetry()
        T = torch.zeros_like(self.T)
        T[:k, :k] = S.T @ self.T[:m, :m] @ S
        T[k : k + waiting, :k] = self.T[m : m + waiting, :m] @ S
        self.T = T
        self.V[: k + waiting] = torch.cat([S.T.to(self.V) @ self.V[:m], self.V[m : m + waiting]])
        self.done, self.count = k, k + waiting

    def append_random(self, rng: torch.Generator) -> bool:
        """Start a further chain from a random row, unless an earlier one is still running."""
        if self.count == self.d or self.waiting > self.block:
            return False
        w = torch.randn(self.d, generator=rng, device=rng.device).to(self.V)
        for _ in range(2):  # what is left of w is short when the basis nearly spans the space
            w, _ = orthogonalise(w / torch.linalg.vector_norm(w), self.V[: self.count])
        self._append(w / torch.linalg.vector_norm(w))
        order = [self.count - 1, *range(self.done, self.count - 1)]
        self.V[self.done : self.count] = self.V[order]
        self.T[self.done : self.count] = self.T[order]
        return True

    def vectors(self, S: Tensor) -> Tensor:
        """Ritz vectors `(d, k)`."""
        return self.V[: self.done].T @ S.to(self.V)

    def errors(self) -> tuple[float, float]:
        """Loss of orthogonality of the basis and asymmetry of the operator."""
        self._note_asymmetry()
        return gram_error(self.V[: self.count]), self.asymmetry

    def _append(self, row: Tensor) -> None:
        if self.count == len(self.V):
            more = min(self.basis, 2 * self.count) - self.count
            self.V = torch.cat([self.V, self.V.new_empty(more, self.d)])
        self.V[self.count] = row
        self.count += 1

    def _append_start(self, column: Tensor) -> None:
        length = torch.linalg.vector_norm(column)
        w, _ = orthogonalise(column / length, self.V[: self.count])
        rest = torch.linalg.vector_norm(w)
        if not rest > 1e3 * torch.finfo(w.dtype).eps:
            raise InputError(
                "start is zero, not finite or has dependent columns; draw it at random"
            )
        self._append(w / rest)

    def _note_asymmetry(self) -> None:
        T = self.T[: self.done, : self.done]
        if self.scale > 0:
            self.asymmetry = max(self.asymmetry, float((T - T.T).abs().max()) / self.scale)


def _both_ends(m: int, keep: int, largest: int, smallest: int) -> Tensor:
    """Indices of `keep` out of m ascending values: the wanted ends and their neighbours."""
    extra = min(keep, m) - largest - smallest
    low = 0 if smallest == 0 else extra if largest == 0 else extra // 2
    index = torch.arange(m)
    return torch.cat([index[: smallest + low], index[m - largest - (extra - low) :]])


def _extremes(krylov: _Krylov, ritz: _Ritz, good: Tensor, split: int, confirmed: bool) -> Extremes:
    values, vectors = ritz.values[ritz.ends], krylov.vectors(ritz.S[:, ritz.ends])
    ends = [
        Eigenpairs(values[part], vectors[:, part], ritz.residuals[part], good[part])
        for part in (slice(split), slice(split, None))
    ]
    orthogonality, asymmetry = krylov.errors()
    return Extremes(*ends, krylov.products, confirmed, orthogonality, asymmetry)


def _check_start(start: Tensor) -> tuple[int, int]:
    if start.ndim not in (1, 2) or start.numel() == 0 or not start.is_floating_point():
        raise InputError(
            f"start is {start.dtype} of shape {tuple(start.shape)}; give floats, (d,) or (d, b)"
        )
    return len(start), start.numel() // len(start)


def _check_options(
    d: int,
    block: int,
    wanted: tuple[int, int],
    tol: float,
    floor: float,
    confirm: int,
    max_products: int,
    basis: int | None,
) -> int:
    """Validate, and return the number of basis vectors."""
    largest, smallest = wanted
    k = largest + smallest
    least = min(d, k + block + 3)  # room for a waiting block, a random row and one new row
    basis = max(100, 2 * least) if basis is None else basis
    rules = (
        (
            min(wanted) >= 0 and 1 <= k <= d,
            f"largest={largest}, smallest={smallest}",
            f"are not 1 to d={d} pairs in all",
        ),
        (block <= d, f"start has {block} columns", f"choose at most d={d}"),
        (tol > 0, f"tol={tol}", "choose a positive number such as 1e-3"),
        (0 <= floor <= 1, f"floor={floor}", "choose a share of the norm, 0 to 1"),
        (confirm >= 0, f"confirm={confirm}", "choose 0 or more products"),
        (basis >= least, f"basis={basis}", f"choose at least {least} vectors for {k} pairs"),
        (max_products >= k, f"max_products={max_products}", f"choose at least {k}"),
    )
    for holds, value, rule in rules:
        if not holds:
            raise InputError(f"{value}: {rule}")
    return min(basis, d)
