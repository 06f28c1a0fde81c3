"""Spectral density, norms and outliers of a symmetric operator A from random probe vectors.

Stochastic Lanczos quadrature (Ubaru, Chen & Saad 2017; Ghorbani, Krishnan & Xiao 2019): m Lanczos
steps from a probe v turn the spectral measure ∑ᵢ (vᵀuᵢ)² δ(λᵢ) into m nodes and weights with the
same moments up to order 2m − 1; averaged over probes that is the density of the eigenvalues.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lsa.maths.spaces import LOCAL, Space
from lsa.maths.spectra.krylov import Matvec
from lsa.maths.spectra.rules import gauss_rule, sign_masses, tridiagonalise
from lsa.maths.spectra.trace import Estimate, mean
from lsa.runtime.errors import InputError
from lsa.runtime.progress import Report


class Density(NamedTuple):
    """A smoothed density φ(x) of the eigenvalues, which integrates to 1."""

    x: Tensor  # (points,)
    value: Tensor  # (points,) mean over the probes, in 1 / unit of x
    error: Tensor  # (points,) standard error over the probes
    width: float  # standard deviation of the Gaussian kernel


class Outliers(NamedTuple):
    """Eigenvalues that stand clear above the bulk."""

    count: Estimate
    edge: Estimate  # the largest Ritz value of the bulk


class Signs(NamedTuple):
    """Shares of the eigenvalues below zero, at zero and above; what is left of 1 is above."""

    negative: Estimate
    zero: Estimate  # nearer to zero than the quadrature resolves, or zero within rounding
    low: float  # the probes' spectral measures have at least this share below zero, on average
    high: float  # and at most this at or below zero


@dataclass(frozen=True)
class Quadrature:
    """Nodes θ and weights w of the spectral measure, one rule per probe."""

    dimension: int  # d
    nodes: Tensor  # (probes, m) ascending, float64 on the CPU
    weights: Tensor  # (probes, m), each row sums to 1
    products: int  # matrix-vector products spent
    known: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    """`(k,)` eigenvalues found exactly elsewhere, of eigenvectors q."""
    shares: Tensor | None = None  # (probes, k) of each probe: (vᵀq)², |v|² = d
    masses: Tensor | None = None  # (probes, 4) of each probe: the fields of `Signs`

    @property
    def trace(self) -> Estimate:
        """tr A = d ∑ₖ wₖ θₖ, of which the known eigenvalues are exact.

        The standard error is Hutchinson's, √(2 tr A²/n) over the n probes and the unknown
        eigenvalues: an upper bound (the diagonal of A adds nothing), and far better than the spread
        of a few probes, which three of them may well underestimate tenfold.
        """
        return self._trace_of_power(1)

    @property
    def frobenius_squared(self) -> Estimate:
        """‖A‖_F² = tr A² = d ∑ₖ wₖ θₖ², with its error as that of the trace."""
        return self._trace_of_power(2)

    def _trace_of_power(self, power: int) -> Estimate:
        value = float((self.known**power).sum() + self._rest(power).mean())
        n = len(self.nodes)
        variance = 2 * max(0.0, float(self._rest(2 * power).mean())) / n
        return Estimate(value, math.sqrt(variance), n)

    def _rest(self, power: int) -> Tensor:
        """vᵀ Aᵖ v without the known eigenvectors, one per probe."""
        total = self.dimension * self._moments(power)
        return total if self.shares is None else total - self.shares @ self.known**power

    @property
    def effective_rank(self) -> Estimate:
        """(tr A)² / ‖A‖_F²: how many equal eigenvalues have this trace and this norm.

        To first order in t = tr A and f = ‖A‖_F², the ratio r is the mean of vᵀBv over the probes
        with B = (2r/t)A − (r/f)A². So its standard error is Hutchinson's for B, as that of the
        trace is Hutchinson's for A. The zero operator has nan.
        """
        trace, norm, n = self.trace.value, self.frobenius_squared.value, len(self.nodes)
        if not norm > 0:
            return Estimate(math.nan, math.nan, n)
        rank = trace**2 / norm
        second, third, fourth = (float(self._rest(p).mean()) for p in (2, 3, 4))
        square = 4 * trace**2 * second - 4 * trace * rank * third + rank**2 * fourth
        return Estimate(rank, math.sqrt(2 * max(0.0, square) / n) / norm, n)

    @property
    def signs(self) -> Signs:
        """Shares of the eigenvalues below zero and at zero, by the rules of `sign_masses`.

        Raises:
            InputError: The rules were not made by `spectral_density`.
        """
        if self.masses is None:
            raise InputError("these rules hold no masses of signs; take those of spectral_density")
        negative, zero, low, high = self.masses.T
        return Signs(mean(negative), mean(zero), float(low.mean()), float(high.mean()))

    def density(
        self,
        low: float | None = None,
        high: float | None = None,
        *,
        width: float | None = None,
        points: int = 512,
    ) -> Density:
        """φ(x) = ∑ₖ wₖ N(x; θₖ, width²), the eigenvalues smoothed by a Gaussian kernel.

        Args:
            low: Left end of the grid. By default the grid holds all nodes with their kernels.
            high: Right end of the grid.
            width: Standard deviation of the kernel. Default: what is shown (the range of the
                nodes, or high − low) divided by m, the narrowest that shows no single nodes in a
                smooth bulk (tuned here on the semicircle and the half-normal, m = 40 and 90).
                To see the bulk beside far outliers, show only the bulk.
            points: Number of grid points, equally spaced.

        Raises:
            InputError: An empty range, a width that is not positive, fewer than two points.
        """
        first, last = float(self.nodes.min()), float(self.nodes.max())
        if width is None:
            shown = (last if high is None else high) - (first if low is None else low)
            width = shown / self.nodes.shape[1] or 1e-3 * max(abs(first), 1.0)
        low = first - 6 * width if low is None else low
        high = last + 6 * width if high is None else high
        if not (width > 0 and low < high and points >= 2):
            raise InputError(
                f"low={low}, high={high}, width={width}, points={points}; "
                "choose low < high, a positive width and 2 points or more"
            )
        x = torch.linspace(low, high, points, dtype=torch.float64)
        kernel = torch.exp(-0.5 * ((x - self.nodes[..., None]) / width).square())
        values = (self.weights[..., None] * kernel).sum(1) / (width * math.sqrt(2 * math.pi))
        n = len(values)
        error = values.std(0) / math.sqrt(n) if n > 1 else torch.full_like(x, math.nan)
        return Density(x, values.mean(0), error, width)

    def outliers(self) -> Outliers:
        """Number of eigenvalues above the bulk, and where the bulk ends, averaged over the probes.

        In each probe the bulk starts below the last gap θₖ − θₖ₊₁, counted from the top, that meets
        three conditions. It is wider than the next five Ritz values together. It is wider than 30 %
        of the distance from θₖ₊₁ to the median of the spectrum. And the k values above it hold the
        mass of k single eigenvalues, within five standard deviations of χ². The first condition
        alone passes gaps at the edge of a bulk of independent eigenvalues, the second alone any gap
        near the median.

        An outlier needs some four steps, so only the upper half of the Ritz values can count,
        unless the Krylov space ended early. Tuned here at 40 and 90 steps: no outlier in 75
        semicircle and Marchenko–Pastur bulks, one in 2 of 25 half-normal bulks; ten planted
        outliers were counted as ten in 23 of 25 cases, as eleven in 2. Single eigenvalues of a
        heavy tail count as well.
        """
        order = self.nodes.flatten().argsort()
        below = self.weights.flatten()[order].cumsum(0) / len(self.nodes)
        median = float(self.nodes.flatten()[order][int((below < 0.5).sum())])
        rules = zip(self.nodes, self.weights, strict=True)
        bulks = [_bulk_edge(theta, self.dimension * w, median) for theta, w in rules]
        counts, edges = torch.tensor(bulks, dtype=torch.float64).T
        return Outliers(mean(counts), mean(edges))

    def _moments(self, power: int) -> Tensor:
        return (self.weights * self.nodes**power).sum(1)


def spectral_density(
    matvec: Matvec,
    dimension: int,
    *,
    rng: torch.Generator,
    probes: int = 10,
    steps: int = 90,
    known: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    space: Space = LOCAL,
    report: Report | None = None,
) -> Quadrature:
    """Stochastic Lanczos quadrature of the spectrum of A: `probes` rules of `steps` nodes.

    Costs `probes` · `steps` products and holds `steps` vectors.

    Args:
        matvec: v `(d,)` ↦ A v `(d,)`.
        dimension: d, or that of this process's part.
        rng: Source of the probes, which are random signs.
        probes: Number of probes; 10 as in Ghorbani et al. (2019).
        steps: Lanczos steps per probe, no more than d; 90 as in Ghorbani et al. (2019).
        known: Eigenvalues `(k,)` and orthonormal eigenvectors `(d, k)` found elsewhere; what they
            contribute to the traces is then exact.
        dtype: Floating type of the vectors; nodes and weights are float64 in any case.
        device: Device of the vectors.
        space: Of the vectors; where processes share them, each has a part.
        report: Called as `report(done, probes, text)` after every probe.

    Raises:
        InputError: Numbers out of range, a product of the wrong shape or not finite.
    """
    if min(dimension, probes, steps) < 1:
        raise InputError(f"dimension={dimension}, probes={probes}, steps={steps}; all must be ≥ 1")
    like = torch.empty(dimension, dtype=dtype, device=device)
    d = space.dimension(like)
    m = min(steps, d)
    nodes = torch.empty(probes, m, dtype=torch.float64)
    weights = torch.zeros(probes, m, dtype=torch.float64)
    values, vectors = known or (torch.zeros(0), torch.zeros(dimension, 0))
    values, vectors = values.double().cpu(), vectors.to(dtype=dtype, device=device)
    shares = torch.zeros(probes, len(values), dtype=torch.float64)
    masses = torch.empty(probes, 4, dtype=torch.float64)
    products = 0
    for i in range(probes):
        v = space.signs(like, rng)
        shares[i] = space.dots(vectors.T, v).square().cpu()
        alpha, beta = tridiagonalise(matvec, v, m, space)
        theta, w = gauss_rule(alpha, beta)
        n = len(theta)  # fewer than m after a breakdown: repeat the last node with no weight
        nodes[i, :n], nodes[i, n:], weights[i, :n] = theta, theta[-1], w
        masses[i] = torch.tensor(sign_masses(alpha, beta, 10 * torch.finfo(dtype).eps))
        products += n
        if report:
            report(i + 1, probes, f"λ {float(theta[0]):.4g} … {float(theta[-1]):.4g}")
    return Quadrature(d, nodes, weights, products, values, shares, masses)


def _bulk_edge(theta: Tensor, mass: Tensor, median: float) -> tuple[int, float]:
    """Number of Ritz values above the bulk, and the largest of the bulk.

    Args:
        theta: Ascending Ritz values `(m,)`.
        mass: Eigenvalues that each stands for, `(m,)`; none after the end of a Krylov space.
        median: Of all eigenvalues.
    """
    ended = not bool(mass[-1] > 0)
    theta, mass = theta[mass > 0].flip(0), mass[mass > 0].flip(0)
    slack = 1e-6 * float(theta.abs().max())  # a bulk of one multiple eigenvalue is its median
    count = 0
    for k in range(1, len(theta) if ended else len(theta) // 2):
        gap, spread = theta[k - 1] - theta[k], theta[k] - theta[min(k + 5, len(theta) - 1)]
        clear = gap > max(float(spread), 0.3 * (float(theta[k]) - median), slack)
        single = mass[:k].sum() < k + 5 * math.sqrt(2 * k)
        if theta[k] > median - slack and clear and single:
            count = k
    return count, float(theta[count])
