"""How large an eigenvalue may be that a search from a random direction has missed.

Sources: Kuczyński & Woźniakowski 1992 for random starts; van Dorsselaer, Hochstenbach & van der
Vorst 2001 for the bound from the chain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.linalg import eigvalsh_tridiagonal
from scipy.optimize import brentq
from scipy.special import stdtrit

SURE = 0.95  # probability, where no other is given
SMALL = 1e-50  # by which numbers are scaled before they overflow


def least_share(dimension: int, sure: float = SURE) -> float:
    """Squared coordinate c² of a random unit vector that is exceeded with probability `sure`.

    c²(D − 1)/(1 − c²) is the square of a Student's t with D − 1 degrees of freedom.

    Args:
        dimension: D, at least 2.
        sure: Probability.
    """
    t = float(stdtrit(dimension - 1, 1 - sure / 2)) ** 2
    return t / (dimension - 1 + t)


def excluded(
    chain: Sequence[tuple[float, float]], *, dimension: int, random: float = 1.0, sure: float = SURE
) -> float:
    """Value above which a symmetric matrix has no eigenvalue, with probability `sure`.

    m products from a start v with the orthonormal chain vⱼ = pⱼ(A) v: an eigenvector u with
    eigenvalue λ has u·vⱼ = pⱼ(λ) u·v, and these are coordinates of a unit vector. So
    (u·v)² ∑ⱼ pⱼ(λ)² ≤ 1. Where λ lies above all that the chain has found, the sum grows with it,
    faster than exponentially in m; and a random v has (u·v)² above `least_share`. (van Dorsselaer,
    Hochstenbach & van der Vorst 2001, SIAM J. Matrix Anal. Appl. 22:837, §3, with all pⱼ in place
    of the last.) Nothing is assumed of the other eigenvalues, and copies of λ make it surer.

    Args:
        chain: (αⱼ, βⱼ₊₁) of the Lanczos recurrence from v, without restarts.
        dimension: D, at least 2.
        random: Share of the squared length of v that is a random direction, in (0, 1]; the rest
            may be any direction.
        sure: Probability.

    Returns:
        The bound, in the units of A; the largest Ritz value where the chain ended by itself.
    """
    alphas, betas = np.array(chain).T
    ritz = eigvalsh_tridiagonal(alphas, betas[:-1])
    top, width = float(ritz[-1]), float(max(ritz[-1] - ritz[0], abs(ritz[-1]), 1e-300))
    if betas[-1] == 0:  # the chain holds all eigenvectors that v contains
        return top
    wanted = -math.log(random * least_share(dimension, sure))

    def excess(step: float) -> float:
        """Logarithm of (u·v)² ∑ⱼ pⱼ²(λ) at λ = top + step."""
        value, before, last, total, scale = top + step, 0.0, 1.0, 1.0, 0.0
        beta = 0.0
        for alpha, following in chain:
            before, last = last, ((value - alpha) * last - beta * before) / following
            beta = following
            total += last * last
            if total > 1 / SMALL**2:
                before, last, total = before * SMALL, last * SMALL, total * SMALL**2
                scale -= 2 * math.log(SMALL)
        return math.log(total) + scale - wanted

    far = width
    while excess(far) < 0:
        far *= 2
    least = 1e-13 * width
    return top if excess(least) >= 0 else top + float(brentq(excess, least, far, rtol=1e-6))  # pyright: ignore
