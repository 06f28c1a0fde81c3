"""The smallest eigenvalue that a search from a random direction would not have missed."""

from __future__ import annotations

import math

from scipy.optimize import brentq
from scipy.special import stdtrit

SURE = 0.95  # probability, where no other is given


def detectable(
    level: float, low: float, high: float, *, dimension: int, products: int, sure: float = SURE
) -> float:
    """Smallest eigenvalue that shows above `level` with probability `sure`.

    m products from a random direction in D dimensions leave of an eigenvector the squared share
    c²T²(γ): T is the Chebyshev polynomial of degree m − 1, at most 1 on the interval of the other
    eigenvalues, γ = (2λ − low − high)/(high − low) the place of λ on its scale. The Rayleigh
    quotient exceeds `level` where c²T²(γ)(λ − level) > level − low. c², a squared coordinate of a
    random unit vector, is above its 5 % quantile with probability 95 %: c²(D − 1)/(1 − c²) is the
    square of Student's t with D − 1 degrees of freedom. (The argument of Kuczyński & Woźniakowski
    1992 for one eigenvalue apart from the rest.)

    Args:
        level: Value above which something is noticed; at least `high`.
        low: Smallest of the other eigenvalues.
        high: Largest of the other eigenvalues.
        dimension: D, at least 1.
        products: m, at least 1.
        sure: Probability.
    """
    if not level > low or dimension < 2:
        return level
    t = float(stdtrit(dimension - 1, 1 - sure / 2)) ** 2
    share = t / (dimension - 1 + t)

    def excess(ratio: float) -> float:
        """Logarithm of the quotient of both sides at λ = level + ratio (level − low)."""
        value = level + ratio * (level - low)
        width = max(high - low, 1e-12 * (level - low))
        position = max(1.0, (2 * value - low - high) / width)
        degree = products - 1
        power = degree * math.acosh(position)
        chebyshev = power - math.log(2) + math.log1p(math.exp(-2 * power))  # log cosh
        return math.log(share) + 2 * chebyshev + math.log(ratio)

    least = 1e-12
    if excess(least) > 0:
        return level
    root = brentq(excess, least, 2 / share)
    return level + (level - low) * float(root)  # pyright: ignore[reportArgumentType]
