"""How many training seeds would settle a difference that the seeds so far do not establish."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import nctdtr, stdtrit

from lsa.reports.statistics.comparison import FEWEST, LEVEL, Comparison, seeds_needed

POWER = 0.8  # of the test, the custom of sample size planning (Cohen 1988)
ENUMERATED = 11  # seeds up to which the power of the sign-flip test is simulated, beyond it t's
STUDIES = 4000  # simulated for a power: its standard error is 0.006
MOST = 200  # seeds; a difference that needs more is called out of reach


@dataclass(frozen=True)
class Forecast:
    """Seeds with which a difference would be established, if it and its spread are as measured."""

    seeds: int  # in all; 0: more than `MOST`
    power: float  # with so many


def forecast(
    comparison: Comparison, wanted: float = POWER, *, level: float = LEVEL
) -> Forecast | None:
    """The fewest seeds with which a comparison would be established with a wanted probability.

    The paired differences are taken as normal, with the mean and the spread of the seeds so far.
    The test must pass the first step of Holm's adjustment: p ≤ level / number of pairs.

    Args:
        comparison: Of the seeds so far.
        wanted: Probability, by default that of `POWER`.
        level: Of the test.

    Returns:
        None with fewer than three seeds, whose spread says too little, without a difference, and
        for a comparison that was not made by sign flips.
    """
    n = len(comparison.seeds)
    if n < 3 or not comparison.test.startswith("exact"):
        return None
    effect = standardised(comparison)
    if not (math.isfinite(effect) and effect != 0):
        return None
    return needed(abs(effect), comparison.family, more_than=n, wanted=wanted, level=level)


def standardised(comparison: Comparison) -> float:
    """Mean over standard deviation of the paired differences (Cohen's d), from their interval."""
    n = len(comparison.seeds)
    if n < 2 or math.isnan(comparison.effect):
        return math.nan
    ends = (comparison.effect, comparison.high)
    mean, high = (math.log(v) for v in ends) if comparison.scale == "ratio" else ends
    half = high - mean
    if half <= 0:
        return math.copysign(math.inf, mean) if mean else 0.0
    return mean / (half * math.sqrt(n) / float(stdtrit(n - 1, 0.975)))


def needed(
    effect: float, family: int, *, more_than: int = 0, wanted: float = POWER, level: float = LEVEL
) -> Forecast:
    """The fewest seeds at which the test finds an effect with the power wanted.

    Args:
        effect: Mean over standard deviation of the paired differences, positive.
        family: Pairs in the adjustment.
        more_than: Seeds that there are, which did not establish it.
        wanted: That power.
        level: Of the family.
    """
    first = max(more_than + 1, FEWEST, seeds_needed(family, level))
    for n in range(first, MOST + 1):
        reached = power(effect, n, level / family)
        if reached >= wanted:
            return Forecast(n, reached)
    return Forecast(0, power(effect, MOST, level / family))


def power(effect: float, n: int, level: float) -> float:
    """Probability that a sign-flip test of n normal differences has p ≤ level.

    With few seeds p takes few values, so the test is simulated. With more seeds its power is that
    of Student's t test (Hoeffding 1952), which is known in closed form.

    Args:
        effect: Mean over standard deviation of the differences.
        n: Number of seeds.
        level: Largest p that counts.
    """
    if n > ENUMERATED:
        critical = float(stdtrit(n - 1, 1 - level / 2))
        return 1 - float(nctdtr(n - 1, effect * math.sqrt(n), critical))
    differences = np.random.default_rng(0).normal(effect, 1, (n, STUDIES))
    signs = 1 - 2 * ((np.arange(2 ** (n - 1))[:, None] >> np.arange(n)) & 1)  # the last stays +
    slack = 1e-9 * np.abs(differences).sum(0)
    p = (np.abs(signs @ differences) >= np.abs(differences.sum(0)) - slack).mean(0)
    return float((p <= level).mean())
