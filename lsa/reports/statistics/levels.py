"""What may be claimed about the sign of one quantity from several training seeds.

A measured number stands on one side of zero beyond its own error, or it does not. Over seeds that
is a sign test: exact, and conservative, since of a number that is zero far fewer than half the
seeds stand beyond their error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import bdtrc

from lsa.reports.statistics.comparison import FEWEST, LEVEL, holm, interval, listed, middle


@dataclass(frozen=True)
class Level:
    """One quantity of one optimizer or pair over its seeds."""

    subject: str
    seeds: tuple[int, ...]
    mean: float  # the median of those known where not all seeds are finite
    low: float  # 95 % t interval of the mean; nan with fewer than two seeds
    high: float
    finite: int  # seeds at which the number is
    side: str = ""  # "above 0" or "below 0": what was tested; empty: nothing
    beyond: int = 0  # seeds at which the number is on that side beyond its own error
    p: float = math.nan  # exact one-sided sign test
    p_adjusted: float = math.nan  # Holm over the subjects
    family: int = 1
    established: bool = False
    unknown: int = 0  # seeds at which its error is not known, so that it is on no side

    @property
    def every(self) -> bool:
        """Whether the number is on that side, beyond its error, at every seed."""
        return self.beyond == len(self.seeds)

    @property
    def statement(self) -> str:
        """The numbers in one plain line."""
        n = len(self.seeds)
        if n < 2:
            text = f"{self.subject}: {self.mean:.3g}, {listed(self.seeds)} alone"
        elif self.finite < n:
            text = f"{self.subject}: median {self.mean:.3g} ({self.finite} of {n} finite)"
        else:
            text = f"{self.subject}: mean {self.mean:.3g} (95 %: {self.low:.3g} … {self.high:.3g})"
        if self.side and n < 2:
            where = self.side if self.beyond else f"not {self.side} beyond its error"
            text += f"; {where} on the only seed"
        elif self.side:
            text += f", {self.side} beyond its error at {self.beyond} of {n} seeds"
            text += f" (not known at {self.unknown})" * bool(self.unknown)
            adjusted = f" ({self.p_adjusted:.2g} adjusted)" if self.family > 1 else ""
            text += f", sign test p = {self.p:.2g}{adjusted}"
        return text if n < 2 else f"{text}, {listed(self.seeds)}"

    @property
    def verdict(self) -> str:
        """The result of the test in words; "" when nothing was tested."""
        if not self.side:
            return ""
        if self.established:
            return "established"
        few = "; too few seeds to conclude" if len(self.seeds) < FEWEST else ""
        return f"not established{few}"


def levels(
    values: Mapping[str, Mapping[int, float]],
    errors: Mapping[str, Mapping[int, float]] | None = None,
    *,
    side: str = "above 0",
    level: float = LEVEL,
) -> list[Level]:
    """Mean and interval of a quantity, and whether it is on one side of zero.

    Established means: at least six seeds, and a Holm-adjusted exact sign-test p of at most `level`.

    Args:
        values: Optimizer or pair → seed → value.
        errors: The same → what the number must be beyond zero by, nan where that is not known;
            None: nothing is tested.
        side: "above 0" or "below 0".
        level: Of the family of all subjects.
    """
    sign = 1 if side == "above 0" else -1
    judged = []
    for subject, by_seed in values.items():
        seeds = tuple(sorted(by_seed))
        numbers = np.array([by_seed[seed] for seed in seeds], dtype=float)
        finite = int(np.isfinite(numbers).sum())
        if finite == len(numbers):
            mean = interval(numbers)
        else:
            mean = middle(numbers), math.nan, math.nan
        if errors is None:
            judged.append(Level(subject, seeds, *mean, finite))
            continue
        margins = np.array([errors[subject][seed] for seed in seeds], dtype=float)
        beyond = int((sign * numbers > margins).sum())
        p = float(bdtrc(beyond - 1, len(seeds), 0.5)) if len(seeds) > 1 else math.nan
        unknown = int(np.isnan(margins).sum())
        judged.append(Level(subject, seeds, *mean, finite, side, beyond, p, unknown=unknown))
    adjusted = holm([level_of.p for level_of in judged])
    return [
        level_of if errors is None else _judged(level_of, p, len(judged), level)
        for level_of, p in zip(judged, adjusted, strict=True)
    ]


def _judged(result: Level, p_adjusted: float, family: int, level: float) -> Level:
    established = len(result.seeds) >= FEWEST and p_adjusted <= level
    return replace(result, p_adjusted=p_adjusted, family=family, established=established)
