"""Quotients of means, with 95 % intervals that need not be symmetric, nor bounded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from scipy.special import stdtrit
from torch import Tensor

HALVINGS = 60  # of an interval of angles, down to rounding


class Quotient(NamedTuple):
    """A quotient of two means, and the ends of its confidence interval."""

    value: float  # nan where the denominator is not told from zero
    low: float
    high: float  # inf where it is not

    @property
    def bounded(self) -> bool:
        """Whether the denominator is told from zero."""
        return math.isfinite(self.high)

    def named(self, name: str) -> dict[str, float]:
        """Itself as `name`, its ends as `name_low` and `name_high`; none that is not known."""
        low = self.low if self.low > 0 or self.bounded else math.nan
        values = {name: self.value, f"{name}_low": low, f"{name}_high": self.high}
        return {key: value for key, value in values.items() if math.isfinite(value)}


def quotient(
    over: Tensor,
    under: Tensor,
    *,
    least: Callable[[float], float] | None = None,
    level: float = 0.95,
) -> Quotient:
    """E[over]/E[under] of means that are not negative, and its confidence interval.

    The interval holds the quotients R ≥ 0 for which a t test does not tell the mean of
    over − R under from zero (Fieller 1954). The test statistic is corrected for the skewness of
    these differences (Hall 1992, "On the removal of skewness by transformation", JRSS B 54), since
    squares have long tails upwards: without it the upper end is too low.

    Args:
        over: Numerators `(n,)`, n ≥ 3; of numbers that are no means, the jackknife's pseudo-values.
        under: Denominators `(n,)` of the same samples.
        least: Variance of the mean of `under` that a mean of the given size has at least. For the
            lower end, where the denominator may be larger than it was found, and vary more.
        level: Of confidence.
    """
    over, under = over.double().cpu(), under.double().cpu()
    top, bottom = float(over.mean()), float(under.mean())
    unit = float(over.std()) or abs(top) or 1.0, float(under.std()) or abs(bottom) or 1.0
    test = _Test(over / unit[0], under / unit[1], least, unit)
    edge = float(stdtrit(len(over) - 1, 0.5 + level / 2))
    estimate = math.atan2(top / unit[0], bottom / unit[1]) if bottom > 0 < top else math.pi / 2

    def ratio(angle: float) -> float:
        return math.tan(angle) * unit[0] / unit[1] if angle < math.pi / 2 else math.inf

    told = test.at(math.pi / 2) < -edge
    low = _crossing(lambda a: test.at(a, careful=True) - edge, 0.0, estimate)
    high = _crossing(lambda a: test.at(a) + edge, estimate, math.pi / 2) if told else math.pi / 2
    return Quotient(top / bottom if told else math.nan, ratio(low), ratio(high))


class _Test:
    """Tests of whether the mean of cos φ · over − sin φ · under is zero."""

    def __init__(
        self,
        over: Tensor,
        under: Tensor,
        least: Callable[[float], float] | None,
        unit: tuple[float, float],
    ) -> None:
        self.n, self._least, self._unit = len(over), least, unit
        self._means = float(over.mean()), float(under.mean())
        centred = over - over.mean(), under - under.mean()
        self._moments = {
            (i, j): float((centred[0] ** i * centred[1] ** j).mean())
            for i, j in ((2, 0), (1, 1), (0, 2), (3, 0), (2, 1), (1, 2), (0, 3))
        }

    def at(self, angle: float, *, careful: bool = False) -> float:
        """Hall's statistic, which is Student's t where there is no skewness; falls with the angle.

        Args:
            angle: φ.
            careful: Whether the denominator's variance is at least what it would be at this φ.
        """
        a, b = math.cos(angle), -math.sin(angle)
        means, n = self._means, self.n
        m = self._moments
        second = a * a * m[2, 0] + 2 * a * b * m[1, 1] + b * b * m[0, 2]
        third = a**3 * m[3, 0] + 3 * a * a * b * m[2, 1] + 3 * a * b * b * m[1, 2] + b**3 * m[0, 3]
        variance = max(second, 0.0) / (n - 1)
        if careful and self._least and b:
            # Of the denominator that this quotient would need.
            size = -a / b * means[0] * self._unit[1]
            wanted = self._least(size) / self._unit[1] ** 2
            variance += b * b * max(0.0, wanted - m[0, 2] / (n - 1))
        mean = a * means[0] + b * means[1]
        if not variance > 0:
            return math.copysign(math.inf, mean) if mean else 0.0
        t = mean / math.sqrt(variance)
        skewness = third / ((n - 1) * variance) ** 1.5 / math.sqrt(n)
        return t + skewness * (1 / 6 + t * t / 3) + skewness**2 * t**3 / 27


def _crossing(f: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function passes zero; an end where it does not."""
    if f(low) <= 0:
        return low
    if f(high) > 0:
        return high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) > 0 else (low, middle)
    return (low + high) / 2
