"""An orthonormal basis grown by products with a symmetric operator A, known only through v ↦ A v.

One relation is kept throughout,

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

from lsa.maths.spaces import LOCAL, Space
from lsa.runtime.errors import InputError, NotFinite

COLUMNS = 1 << 16  # of the basis that are copied at once

Matvec = Callable[[Tensor], Tensor]
"""v `(d,)` ↦ A v `(d,)`, A symmetric."""


def orthogonalise(w: Tensor, V: Tensor, space: Space = LOCAL) -> tuple[Tensor, Tensor]:
    """w − VᵀVw for orthonormal rows V, and the coefficients Vw.

    Classical Gram–Schmidt, done twice, which is enough (Giraud, Langou & Rozložník 2005).

    Args:
        w: `(d,)`.
        V: Orthonormal rows `(j, d)`.
        space: Of the vectors.

    Returns:
        The rest `(d,)` in the dtype of w, and the coefficients `(j,)` in float64.
    """
    first = space.dots(V, w)
    w = torch.addmv(w, V.T, first.to(w), alpha=-1)
    second = space.dots(V, w)
    return torch.addmv(w, V.T, second.to(w), alpha=-1), first + second


def orthonormal(V: Tensor, space: Space = LOCAL) -> Tensor:
    """Orthonormal rows `(r, d)` that span the rows of V `(k, d)`, r ≤ k.

    Gram–Schmidt with sums in float64: a QR decomposition in float32 of ten million rows, of which
    few are large, is off by percents. A row within rounding of the span of earlier rows is left
    out.
    """
    rows, r = torch.empty_like(V), 0
    for v in V:
        rest, _ = orthogonalise(v, rows[:r], space)
        length = float(space.length(rest))
        if negligible(length, float(space.length(v)), V.dtype):
            continue
        # A short rest has lost digits: once more, now that it is a unit vector.
        rest, _ = orthogonalise(rest / length, rows[:r], space)
        rows[r] = rest / float(space.length(rest))
        r += 1
    return rows[:r]


def apply(matvec: Matvec, v: Tensor) -> Tensor:
    """A v `(d,)` for v `(d,)`, in the dtype of v.

    Raises:
        InputError: The product has another shape.
    """
    w = matvec(v).detach()
    if w.shape != v.shape:
        raise InputError(f"matvec returned {tuple(w.shape)} for {tuple(v.shape)}; return A v")
    return w.to(v)


def to_host(coefficients: Tensor) -> Tensor:
    """Coefficients `(j,)` as float64 on the CPU.

    Raises:
        NotFinite: One is infinite or nan, since the operator overflowed.
    """
    coefficients = coefficients.double().cpu()
    if not bool(coefficients.isfinite().all()):
        raise NotFinite("the product A v is not finite; the loss has diverged at this θ")
    return coefficients


def negligible(rest: float, scale: float, dtype: torch.dtype) -> bool:
    """Whether the rest of a product is rounding error: the basis spans an invariant subspace.

    Args:
        rest: Length of the product without its part in the basis.
        scale: Length of the product, or the largest coefficient so far.
        dtype: Of the vectors; ten times its unit roundoff counts as rounding.
    """
    return rest <= 10 * torch.finfo(dtype).eps * scale


def gram_error(V: Tensor, space: Space = LOCAL) -> float:
    """max |V Vᵀ − I|: how far the rows of V `(r, d)` are from orthonormal."""
    gram = torch.zeros(len(V), len(V), dtype=torch.float64, device=V.device)
    for part in V.split(COLUMNS, dim=1):  # in pieces: all of V in float64 may not fit
        gram += part.double() @ part.double().T
    gram = space.total(gram)
    return float((gram - torch.eye(len(V), dtype=torch.float64, device=V.device)).abs().max())


@dataclass(frozen=True)
class Ritz:
    """All Ritz values of the rows multiplied so far, and the residuals of the wanted ones."""

    values: Tensor  # (m,) ascending
    S: Tensor  # (m, m) eigenvectors of the projected matrix
    ends: Tensor  # indices of the wanted ones: the upper end descending, then the lower ascending
    residuals: Tensor  # ‖T s − θ s‖ of the wanted ones
    waiting: Tensor  # (n − m, k) components of these residuals along the rows not yet multiplied

    @property
    def wanted(self) -> Tensor:
        """The wanted Ritz values `(k,)`: the upper end descending, then the lower ascending."""
        return self.values[self.ends]

    def describe(self) -> str:
        """Progress in one line."""
        low, high = float(self.values[0]), float(self.values[-1])
        return f"λ {low:.4g} … {high:.4g}, worst residual {float(self.residuals.max()):.1e}"


class Krylov:
    """The basis V, the coefficients T (float64 on the CPU) and the relation between them.

    Args:
        start: Start vector `(d,)` or block `(d, b)`.
        basis: Most rows held.
        space: Of the vectors; where processes share them, each has a part of every row.
    """

    def __init__(self, start: Tensor, basis: int, space: Space = LOCAL) -> None:
        columns = start.detach().reshape(len(start), -1)
        self.space, self.block = space, columns.shape[1]
        self.d = space.dimension(columns)
        self.basis = basis
        # A CPU gives memory when it is written to, so there all rows are asked for at once.
        rows = basis if columns.device.type == "cpu" else min(basis, max(16, 2 * self.block))
        self.V = columns.new_empty(rows, len(columns))
        self.T = torch.zeros(basis, basis, dtype=torch.float64)
        self.done = self.count = self.products = 0
        self.asymmetry = self.scale = 0.0
        self.chain: list[tuple[float, float]] = []  # αⱼ, βⱼ₊₁ of the start, up to the first restart
        self._single = self.block == 1
        for column in columns.T:
            self._append_start(column)

    def multiply(self, matvec: Matvec) -> bool:
        """Multiply the first waiting row and append the new part of the product, if any is left."""
        j, n = self.done, self.count
        w, c = orthogonalise(apply(matvec, self.V[j]), self.V[:n], self.space)
        c = to_host(torch.cat([c, self.space.length(w)[None]]))  # the only synchronisation
        self.T[:n, j] = c[:n]
        self.done, self.products = j + 1, self.products + 1
        self.scale = max(self.scale, float(c.abs().max()))
        grows = n < self.d and not negligible(float(c[n]), self.scale, w.dtype)
        if grows:
            self.T[n, j] = c[n]
            self._append(w.div_(float(c[n])))
        if self._single:
            self.chain.append((float(c[j]), float(c[n]) if grows else 0.0))
            self._single = grows
        return grows

    def ritz(self, wanted: tuple[int, int]) -> Ritz:
        """Diagonalise the symmetric part of T; what T lacks of symmetry stays in the residuals."""
        m, n = self.done, self.count
        values, S = torch.linalg.eigh((self.T[:m, :m] + self.T[:m, :m].T) / 2)
        index = torch.arange(m)
        ends = torch.cat([index.flip(0)[: wanted[0]], index[: wanted[1]]])
        R = self.T[:n, :m] @ S[:, ends]
        R[:m] -= S[:, ends] * values[ends]
        return Ritz(values, S, ends, R.norm(dim=0), R[m:])

    def make_room(self, ritz: Ritz, wanted: tuple[int, int]) -> None:
        """Restart from the Ritz vectors of both ends when the next two rows would not fit."""
        m, n = self.done, self.count
        if self.basis == self.d or n + 2 <= self.basis:
            return
        self._single = False
        room = min(self.basis // 2, self.basis - 2 - (n - m))  # a half was the best share tried
        S = ritz.S[:, _both_ends(m, max(room, sum(wanted)), wanted)]
        k = S.shape[1]
        self._note_asymmetry()
        T = torch.zeros_like(self.T)
        T[:k, :k] = S.T @ self.T[:m, :m] @ S
        T[k : k + n - m, :k] = self.T[m:n, :m] @ S
        self.T, self.done, self.count = T, k, k + n - m
        S = S.T.to(self.V)
        for columns in self.V.split(COLUMNS, dim=1):  # in place: a second basis may not fit
            columns[: self.count] = torch.cat([S @ columns[:m], columns[m:n]])

    def append_random(self, rng: torch.Generator, wanted: tuple[int, int]) -> bool:
        """Append a random row, first in the queue; False where no row is new or none fits.

        A waiting row cannot be dropped, since the residuals of Ritz pairs lie along it. So the
        number of chains is limited by the room that restarts need for the wanted pairs.
        """
        waiting = self.count - self.done
        if self.count == self.d or waiting + 1 + sum(wanted) + 2 > self.basis < self.d:
            return False
        self._single = False
        w = self.space.normal(self.V[0], rng)
        for _ in range(2):  # little of w is left when the basis nearly spans the space
            w, _ = orthogonalise(self._unit(w), self.V[: self.count], self.space)
        self._append(self._unit(w))
        self.put_first(-1)
        return True

    def put_first(self, which: int) -> None:
        """Move a waiting row to the front of the queue; −1 is the row appended last."""
        order = list(range(self.done, self.count))
        order.insert(0, order.pop(which))
        self.V[self.done : self.count] = self.V[order]
        self.T[self.done : self.count] = self.T[order]

    def vectors(self, S: Tensor) -> Tensor:
        """Ritz vectors `(d, k)` of coefficients `(m, k)`."""
        return self.V[: self.done].T @ S.to(self.V)

    def errors(self) -> tuple[float, float]:
        """Loss of orthogonality of the basis, and asymmetry of the operator."""
        self._note_asymmetry()
        return gram_error(self.V[: self.count], self.space), self.asymmetry

    def _unit(self, w: Tensor) -> Tensor:
        return w / self.space.length(w).to(w)

    def _append(self, row: Tensor) -> None:
        if self.count == len(self.V):
            more = min(self.basis, 2 * self.count) - self.count
            self.V = torch.cat([self.V, self.V.new_empty(more, self.V.shape[1])])
        self.V[self.count] = row
        self.count += 1

    def _append_start(self, column: Tensor) -> None:
        w, _ = orthogonalise(self._unit(column), self.V[: self.count], self.space)
        if not self.space.length(w) > 1e3 * torch.finfo(w.dtype).eps:
            raise InputError(
                "start is zero, not finite or has dependent columns; draw it at random"
            )
        w, _ = orthogonalise(self._unit(w), self.V[: self.count], self.space)
        self._append(self._unit(w))

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
