"""The steps of Lanczos to both ends, and random directions that look for missed eigenvalues."""

from __future__ import annotations

import torch
from torch import Tensor

from lsa.maths.spectra.krylov import Krylov, Matvec
from lsa.runtime.progress import Report

NEGLIGIBLE = 1e-8  # of the norm: an eigenvalue and a residual as small count as zero


class Search:
    """The steps of a search, and the Ritz pairs after the last of them."""

    def __init__(
        self,
        matvec: Matvec,
        krylov: Krylov,
        wanted: tuple[int, int],
        rng: torch.Generator,
        tol: float,
        floor: float,
        max_products: int,
        report: Report | None,
    ) -> None:
        self.matvec, self.krylov, self.wanted, self.rng = matvec, krylov, wanted, rng
        self.tol, self.floor = tol, floor
        self.max_products, self.report = max_products, report
        self.full = False  # the basis has no room for one more random direction
        self.asked = False  # a random direction has been multiplied
        self.eps = 10 * torch.finfo(krylov.V.dtype).eps  # rounding, relative to ‖A‖
        self._step()

    @property
    def noise(self) -> float:
        """Error of a product with a vector of length 1; 0 for products without an estimate."""
        return getattr(self.matvec, "noise", 0.0)

    @property
    def converged(self) -> bool:
        """Whether every wanted pair has converged."""
        return bool(self.good.all())

    @property
    def over(self) -> bool:
        """Whether no further product is possible or allowed."""
        krylov = self.krylov
        return self.full or krylov.done == krylov.d or krylov.products == self.max_products

    def changed(self, before: Tensor) -> bool:
        """Whether a wanted value differs by more than its tolerance from that before, `(k,)`."""
        return bool(((self.ritz.wanted - before).abs() > self.allowed).any())

    def converge(self) -> None:
        """Multiply until all wanted pairs have converged."""
        while not (self.converged or self.over):
            self.krylov.make_room(self.ritz, self.wanted)
            if self.krylov.done == self.krylov.count:
                self.krylov.append_random(self.rng, self.wanted)
            elif self.asked:  # several chains: the one that the residuals left lie along
                left = self.ritz.waiting[:, ~self.good].norm(dim=1)
                self.krylov.put_first(int(left.argmax()))
            self._step()

    def go_on(self, products: int) -> None:
        """Multiply so many times more the waiting row that the residuals left lie along.

        A search that has ended early, on an inner eigenvalue, has most of the missed eigenvector in
        this row. Random directions are made orthogonal to it, and would not see it.
        """
        for _ in range(products):
            if self.over:
                return
            self.krylov.make_room(self.ritz, self.wanted)
            if self.krylov.done == self.krylov.count:
                return
            self.krylov.put_first(int(self.ritz.waiting.norm(dim=1).argmax()))
            self._step()

    def ask_random_direction(self, products: int) -> bool:
        """Multiply a chain of so many products from a random direction.

        A chain that ends early has spanned an invariant subspace; another random direction follows.

        Returns:
            False where the search was over before the chain was complete.
        """
        before = self.ritz.wanted
        for i in range(products):
            if self.over:
                return False
            self.krylov.make_room(self.ritz, self.wanted)
            self.asked = True
            if i and self.grew:
                self.krylov.put_first(-1)  # its chain goes on alone
            else:
                free = self.krylov.d - self.krylov.count
                self.full = not self.krylov.append_random(self.rng, self.wanted) and free > 0
            self._step()
            if self.changed(before):
                return True
        return True

    def _step(self) -> None:
        self.grew = self.krylov.multiply(self.matvec)
        self.ritz = self.krylov.ritz(self.wanted)
        self.allowed = self._allowed()
        # What products add to a residual leaves less room for it; below that nothing is gained.
        enough = (self.allowed - self.noise).clamp(min=self.noise)
        self.good = (self.ritz.residuals <= enough) & (self.krylov.done >= sum(self.wanted))
        if self.report:
            self.report(self.krylov.products, self.max_products, self.ritz.describe())

    def _allowed(self) -> Tensor:
        """Residuals at which the search for a pair ends, `(k,)`."""
        values, norm = self.ritz.wanted, float(self.ritz.values.abs().max())
        allowed = self.tol * values.abs().clamp(min=self.floor * norm)
        outward = torch.where(torch.arange(len(values)) < self.wanted[0], values, -values)
        beyond = outward > self.eps * norm
        return torch.where(beyond, torch.minimum(allowed, values.abs()), allowed)

    def known(self) -> Tensor:
        """Which wanted values exceed their residual, or count as zero; `(k,)` bool.

        A value counts as zero where |θ| ≤ residual²/gap with a gap of floor · ‖A‖, the bound for an
        isolated eigenvalue 0, or where value and residual are within rounding.
        """
        values, residuals = self.ritz.wanted.abs(), self.ritz.residuals
        norm = float(self.ritz.values.abs().max())
        zero = values * self.floor * norm <= residuals.square()
        negligible = torch.maximum(values, residuals) <= max(self.eps, NEGLIGIBLE) * norm
        return zero | negligible | (residuals <= values)
