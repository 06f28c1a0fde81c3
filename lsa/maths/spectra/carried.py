"""The largest eigenvalue of an operator that changes a little between measurements.

Each measurement starts from three vectors of the last one: the top eigenvector, the second and a
searcher. It multiplies them, projects the operator onto them, and adds residuals until the answer
is good enough (Davidson 1975). A full basis is restarted from its best vectors.

A Ritz value θ with the residual r lies r²/(θ − β) below the eigenvalue at most, where all other
eigenvalues are below β (Temple's inequality; Parlett, The Symmetric Eigenvalue Problem, §10.5). So
a search ends long before r is as small as the error that is allowed. β is estimated: it is the
second Ritz value and its residual. A first search has not seen the second eigenvalue, so it goes on
until r is small.

Another eigenvalue may overtake the top one between two measurements. The old top eigenvector still
is an eigenvector then, so its residual stays small and does not show it. Therefore the searcher
makes one step of a power iteration in each measurement, mixed with a new random vector. The stated
residual counts how far each of the other Ritz values may still rise above the top.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lsa.maths.spaces import LOCAL, Space
from lsa.maths.sums import square

FULL = 8  # vectors of a basis, each kept with its product
KEPT = 3  # of them, where it is restarted
FRESH = 0.3  # length of the new vector that the searcher, of length 1, is mixed with
ROUNDING = 4  # residuals are not below so many roundings of the largest Ritz value
SHIFT = 0.5  # share of λ_max added to the operator in the searcher's step, away from λ_min

Matvec = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Top:
    """An estimate of the largest eigenvalue."""

    value: float  # Ritz value: the largest eigenvalue is not below it
    residual: float  # ‖A y − θ y‖, or how far another may rise above θ, if that is more
    vectors: Tensor  # (3, d): Ritz vectors of the top and of the second, and the searcher
    products: int


def top(
    matvec: Matvec,
    carried: Tensor,
    fresh: Tensor,
    *,
    tol: float,
    max_products: int,
    first: bool = False,
    space: Space = LOCAL,
) -> Top:
    """λ_max of a symmetric operator, from vectors that were near the top before.

    Args:
        matvec: v `(d,)` ↦ A v `(d,)`.
        carried: `(3, d)`: `Top.vectors` of the last measurement, or any to begin with.
        fresh: A random vector `(d,)`, or one that is likely to have a part along a new top vector.
        tol: Error allowed, relative to the value: r²/(θ − β), and how far another may exceed θ.
        max_products: Most products, at least 4. Where they do not suffice, the residual says so.
        first: Whether no measurement was before: then r itself must be small.
        space: Of the vectors.
    """
    *pair, searcher = carried
    searcher = _unit(searcher, space) + FRESH * _unit(fresh, space)
    basis = _Basis(matvec, space)
    for v in (*pair, searcher):
        basis.add(v)
    basis.add(basis.residual(-KEPT))  # two products in a row show what one hides
    while True:
        state = basis.state()
        error = max(state.residual if first else state.error, state.doubt)
        enough = error <= tol * abs(state.value)
        if enough or basis.products >= max_products:
            break
        if not basis.add(basis.residual(state.worst)):  # the basis holds an invariant space
            break
    return Top(state.value, max(state.residual, state.doubt), basis.carried(), basis.products)


def _unit(v: Tensor, space: Space) -> Tensor:
    length = math.sqrt(float(space.total(square(v))))
    return v / length if length > 0 else v


@dataclass(frozen=True)
class _State:
    """What a basis says of the top."""

    value: float  # θ, the largest Ritz value
    residual: float  # ‖A y − θ y‖
    error: float  # how far below the eigenvalue θ is, as far as the basis tells
    doubt: float  # how far another Ritz value may rise above θ
    worst: int  # the Ritz pair whose residual is to be added


class _Basis:
    """Orthonormal vectors with their products, and what the operator is among them."""

    def __init__(self, matvec: Matvec, space: Space) -> None:
        self._matvec, self._space = matvec, space
        self._k = 0
        self._vectors = self._products = torch.empty(0)  # (FULL, d), of which k rows are in use
        self._T = self._G = torch.zeros(0, 0, dtype=torch.float64)  # V·W and W·W
        self.products = 0

    @property
    def _V(self) -> Tensor:
        return self._vectors[: self._k]

    @property
    def _W(self) -> Tensor:
        return self._products[: self._k]

    def add(self, v: Tensor) -> bool:
        """Multiply the part of a vector outside the basis; False where there is none."""
        if not self._k:
            self._vectors, self._products = v.new_empty(FULL, len(v)), v.new_empty(FULL, len(v))
        if self._k == FULL:
            self._restart()
        k, V = self._k, self._V
        own = self._vectors[k].copy_(v)
        length = before = self._length(own)
        for _ in range(2 if k else 0):
            own.addmv_(V.T, self._space.dots(V, own).to(own), alpha=-1)
            length, last = self._length(own), length
            if length > 0.5 * last:  # else rounding has left a part along the others
                break
        if not length > 1e-6 * before:
            return False
        product = self._products[k].copy_(self._matvec(own.div_(length)))
        self.products, self._k = self.products + 1, k + 1
        self._T = _larger(self._T, self._space.dots(self._V, product).cpu())
        self._G = _larger(self._G, self._space.dots(self._W, product).cpu())
        return True

    def state(self) -> _State:
        """Of the Ritz pairs as they are."""
        values, Y = torch.linalg.eigh(self._T)
        rounding = ROUNDING * torch.finfo(self._V.dtype).eps * float(values.abs().max())
        lengths = ((Y * (self._G @ Y)).sum(0) - values.square()).clamp_min(rounding**2).sqrt()
        top, residual, doubt, worst = float(values[-1]), float(lengths[-1]), 0.0, len(values) - 1
        for i in range(max(0, len(values) - KEPT), len(values) - 1):
            reach = float(values[i] + lengths[i]) - top
            if reach > max(doubt, residual):
                doubt, worst = reach, i
        gap = top - float(values[-2] + lengths[-2]) if len(values) > 1 else 0.0
        error = residual * residual / gap if gap > residual else residual
        return _State(top, residual, error, doubt, worst)

    def residual(self, i: int) -> Tensor:
        """A y − θ y of Ritz pair i: 0 is the smallest, −j the jth from the top, or the smallest."""
        values, Y = torch.linalg.eigh(self._T)
        i = max(i, -len(values))
        y = Y[:, i].to(self._V)
        return torch.mv(self._W.T, y).addmv_(self._V.T, y, alpha=-float(values[i]))

    def carried(self) -> Tensor:
        """The vectors `(3, d)` for the next measurement; zeros where there are fewer."""
        values, Y = torch.linalg.eigh(self._T)
        values, Y = values.flip(0), Y.flip(1).to(self._V)
        vectors = torch.zeros_like(self._vectors[:KEPT])
        for vector, y in zip(vectors[:2], Y.T, strict=False):
            torch.mv(self._V.T, y, out=vector)
        if len(values) > 2:
            shift = SHIFT * abs(float(values[0]))
            torch.mv(self._W.T, Y[:, 2], out=vectors[2]).addmv_(self._V.T, Y[:, 2], alpha=shift)
        return vectors

    def _length(self, v: Tensor) -> float:
        return math.sqrt(float(self._space.total(square(v))))

    def _restart(self) -> None:
        values, Y = torch.linalg.eigh(self._T)
        best = Y.flip(1)[:, :KEPT]
        for rows in (self._vectors, self._products):
            rows[:KEPT] = best.T.to(rows) @ rows[: self._k]
        self._k, self._T, self._G = KEPT, torch.diag(values.flip(0)[:KEPT]), best.T @ self._G @ best


def _larger(known: Tensor, column: Tensor) -> Tensor:
    """A symmetric matrix with one row and column more."""
    k = len(column)
    larger = column.new_zeros(k, k)
    larger[:-1, :-1] = known
    larger[-1], larger[:, -1] = column, column
    return larger
