"""The largest eigenvalue of an operator that changes a little between measurements.

Each measurement starts from three vectors of the last one: the top eigenvector, the second and a
searcher. It multiplies them, projects the operator onto them, and adds residuals until the answer
is good enough (Davidson 1975). A full basis is restarted from its best vectors.

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
    space: Space = LOCAL,
) -> Top:
    """λ_max of a symmetric operator, from vectors that were near the top before.

    Args:
        matvec: v `(d,)` ↦ A v `(d,)`.
        carried: `(3, d)`: `Top.vectors` of the last measurement, or any to begin with.
        fresh: A random vector `(d,)`, or one that is likely to have a part along a new top vector.
        tol: Residual allowed, relative to the value.
        max_products: Most products, at least 4. Where they do not suffice, the residual is larger
            than `tol` allows.
        space: Of the vectors.
    """
    first, second, searcher = carried
    searcher = _unit(searcher, space) + FRESH * _unit(fresh, space)
    basis = _Basis(matvec, space)
    for v in (first, second, searcher):
        basis.add(v)
    basis.add(basis.residual_of_last())  # two products in a row show what one hides
    while True:
        value, residual, doubt, worst = basis.state()
        if max(residual, doubt) <= tol * abs(value) or basis.products >= max_products:
            break
        if not basis.add(worst()):  # nothing is left to add: the basis holds an invariant space
            break
    return Top(value, max(residual, doubt), basis.carried(), basis.products)


def _unit(v: Tensor, space: Space) -> Tensor:
    length = math.sqrt(float(space.total(square(v))))
    return v / length if length > 0 else v


class _Basis:
    """Orthonormal vectors with their products, and what the operator is among them."""

    def __init__(self, matvec: Matvec, space: Space) -> None:
        self._matvec, self._space = matvec, space
        self._k = 0
        self._V = self._W = torch.empty(0)  # (FULL, d), of which k rows are in use
        self._T = self._G = torch.zeros(0, 0, dtype=torch.float64)  # V·W and W·W
        self.products = 0

    def add(self, v: Tensor) -> bool:
        """Multiply the part of a vector outside the basis; False where there is none."""
        if not self._k:
            self._V, self._W = v.new_empty(FULL, len(v)), v.new_empty(FULL, len(v))
        if self._k == FULL:
            self._restart()
        k, before = self._k, self._length(v)
        length = before
        for _ in range(2 if k else 0):
            v = v - self._space.dots(self._V[:k], v).to(v) @ self._V[:k]
            length, before_ = self._length(v), length
            if length > 0.5 * before_:  # else rounding has left a part along the others
                break
        if not length > 1e-6 * before:
            return False
        torch.div(v, length, out=self._V[k])
        self._W[k] = self._matvec(self._V[k])
        self.products, self._k = self.products + 1, k + 1
        self._T = self._larger(self._T, self._V)
        self._G = self._larger(self._G, self._W)
        return True

    def state(self) -> tuple[float, float, float, Callable[[], Tensor]]:
        """Top Ritz value, its residual, how far another may exceed it, and the worst residual."""
        values, Y = torch.linalg.eigh(self._T)
        lengths = ((Y * (self._G @ Y)).sum(0) - values.square()).clamp_min(0).sqrt()
        above, residual, doubt, worst = float(values[-1]), float(lengths[-1]), 0.0, len(values) - 1
        for i in range(max(0, len(values) - KEPT), len(values) - 1):
            reach = float(values[i] + lengths[i]) - above
            if reach > max(doubt, residual):
                doubt, worst = reach, i

        return above, residual, doubt, lambda: self._residual(float(values[worst]), Y[:, worst])

    def residual_of_last(self) -> Tensor:
        """Residual of the third Ritz pair, or of the last where there are fewer."""
        values, Y = torch.linalg.eigh(self._T)
        i = max(0, len(values) - KEPT)
        return self._residual(float(values[i]), Y[:, i])

    def _residual(self, value: float, y: Tensor) -> Tensor:
        own, product = (self._joined(rows, y[:, None])[0] for rows in (self._V, self._W))
        return product.sub_(own, alpha=value)

    def carried(self) -> Tensor:
        """The vectors `(3, d)` for the next measurement; zeros where there are fewer."""
        values, Y = torch.linalg.eigh(self._T)
        values, Y = values.flip(0), Y.flip(1)
        vectors = torch.zeros_like(self._V[:KEPT])
        vectors[:2] = self._joined(self._V, Y[:, :2])
        if len(values) > 2:
            step, own = (self._joined(rows, Y[:, 2:3])[0] for rows in (self._W, self._V))
            vectors[2] = torch.add(step, own, alpha=SHIFT * abs(float(values[0])))
        return vectors

    def _joined(self, rows: Tensor, Y: Tensor) -> Tensor:
        """Combinations `(m, d)` of vectors, or of products, with weights Y `(k, m)`."""
        return Y.T.to(rows) @ rows[: self._k]

    def _larger(self, known: Tensor, rows: Tensor) -> Tensor:
        """Products of the rows in use with those of W, of which the last is new."""
        k = self._k
        column = self._space.dots(rows[:k], self._W[k - 1]).cpu()
        larger = torch.zeros(k, k, dtype=torch.float64)
        larger[:-1, :-1] = known
        larger[-1], larger[:, -1] = column, column
        return larger

    def _length(self, v: Tensor) -> float:
        return math.sqrt(float(self._space.total(square(v))))

    def _restart(self) -> None:
        values, Y = torch.linalg.eigh(self._T)
        best = Y.flip(1)[:, :KEPT]
        self._V[:KEPT], self._W[:KEPT] = (self._joined(rows, best) for rows in (self._V, self._W))
        self._k, self._T, self._G = KEPT, torch.diag(values.flip(0)[:KEPT]), best.T @ self._G @ best
