"""How many products a Lanczos search will take, before anything of the spectrum is known.

The bound is that of Kaniel, Paige and Saad (Saad 2011, "Numerical methods for large eigenvalue
problems", §6.6): after m products the i-th eigenvector is within an angle of tan φ/T(1 + 2γ) of
what they span. T is the Chebyshev polynomial of degree m − i, φ the angle to the start, γ the gap
to the next eigenvalue over the range of those behind.

The spectrum is taken to be like a network's: its eigenvalues fall as 1/k from both ends, so γ = 1/k
at the upper end, and the lower end is a twentieth of the upper. A kinder network has gaps four
times as wide and a lower end of 0.3 of the upper. A harder one has gaps four times as narrow, and
its gradient is no better a start than a random vector.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from lsa.maths.spectra.eigenpairs import CONFIRM, LOOSE, ON, SHARE

GAPS = (4.0, 1.0, 0.25)  # as they follow from 1/k, times this
LOWER = (0.3, 0.05, 0.05)  # |λ_min|/λ_max
NEAR = 10.0  # tan φ of a start with the gradient, most of which lies in the top eigenspace
DEFLATED = 200  # upper eigenvalues at most that are found beside the lower end


class Count(NamedTuple):
    """Products at a kind network, usually, and at a hard one."""

    least: int
    usual: int
    most: int


def upper(k: int, tol: float, dimension: int, *, near: bool = False) -> Count:
    """Products until the k largest eigenvalues have converged and are confirmed.

    Args:
        k: Pairs wanted.
        tol: Residual allowed, relative to the eigenvalue.
        dimension: d.
        near: Whether the start has the gradient of the same loss in it; else tan φ is √d.
    """
    far = math.sqrt(dimension)
    starts = (NEAR, NEAR, far) if near else (far, far, far)
    found = (k - 1 + _degree(s / tol, gap / k) for s, gap in zip(starts, GAPS, strict=True))
    return _count(found, tol, dimension)


def both(largest: int, smallest: int, tol: float, dimension: int, *, near: bool = True) -> Count:
    """Products until pairs at both ends have converged and are confirmed.

    The lower end takes longer. With j upper eigenvalues found, the range of the others is shorter,
    and γ at the lower end larger; the best j counts.

    Args:
        largest: Pairs wanted at the upper end.
        smallest: Pairs wanted at the lower end; 0: the upper end alone.
        tol: Residual allowed, relative to the eigenvalue.
        dimension: d.
        near: As for `upper`; it matters to the upper end alone.
    """
    above = upper(largest, tol, dimension, near=near)
    if not smallest:
        return above
    start, found = math.sqrt(dimension), []
    for low, factor in zip(LOWER, GAPS, strict=True):
        gap = factor * low / (smallest * (smallest + 1))  # low/k − low/(k + 1)
        degrees = (
            j + _degree(start / (tol * low), gap / (1 / (j + 1) + low)) for j in range(1, DEFLATED)
        )
        found.append(smallest - 1 + min(degrees))
    below = _count(found, tol, dimension)
    return Count(*map(max, above, below))


def _degree(factor: float, gap: float) -> float:
    """Degree m of the polynomial with T(1 + 2γ) equal to a factor."""
    return math.acosh(max(1.0, factor)) / math.acosh(1 + 2 * gap)


def _count(found: Iterable[float], tol: float, dimension: int) -> Count:
    """Products with those that look for missed eigenvalues, no more than there are dimensions."""
    searched = (products + (ON if tol > LOOSE else 0) for products in found)
    least, usual, most = (products + max(CONFIRM, SHARE * products) for products in searched)
    rounded = math.floor(least), round(usual), math.ceil(most)
    return Count(*(min(dimension, products) for products in rounded))
