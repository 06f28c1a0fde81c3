"""What may be claimed about two optimizers from several training seeds.

The unit of replication is the training seed, and optimizers are paired by it: samples, batches and
probe vectors are not replicates. A difference is established only by an exact test, adjusted for
the number of pairs; everything else is reported as not established, with its interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from scipy.special import stdtrit

from lsa.runtime.errors import InputError

LEVEL = 0.05  # of the family of all pairs
FEWEST = 6  # seeds; below it no two-sided sign-flip test can reach 5 %
EXACT = 20  # seeds up to which all sign flips are enumerated
RESAMPLES = 100_000  # beyond it

Scale = Literal["ratio", "difference"]


@dataclass(frozen=True)
class Comparison:
    """One pair of optimizers on one quantity, over the seeds that both have."""

    a: str
    b: str
    scale: Scale
    seeds: tuple[int, ...]
    effect: float = math.nan  # geometric mean of a/b over the seeds, or mean of a − b
    low: float = math.nan  # 95 % t interval of the effect; nan with fewer than two seeds
    high: float = math.nan
    p: float = math.nan  # two-sided p of the test; nan with fewer than two seeds
    p_adjusted: float = math.nan  # Holm over all pairs
    family: int = 1  # number of those pairs
    established: bool = False
    test: str = "exact p"
    note: str = ""  # why the pair was not compared, or what limits the comparison

    @property
    def larger(self) -> str:
        """The optimizer with the larger value; none when they are equal or not compared."""
        neutral = 1.0 if self.scale == "ratio" else 0.0
        if self.effect == neutral or math.isnan(self.effect):
            return ""
        return self.a if self.effect > neutral else self.b

    @property
    def statement(self) -> str:
        """The numbers in one plain line."""
        name = f"{self.a}/{self.b}" if self.scale == "ratio" else f"{self.a} − {self.b}"
        if math.isnan(self.effect):
            return f"{name} not compared: {self.note}"
        if len(self.seeds) < 2:
            return f"{name} = {self.effect:.3g}, {listed(self.seeds)} alone"
        numbers = f"{name} = {self.effect:.3g} (95 %: {self.low:.3g} … {self.high:.3g})"
        adjusted = f" ({self.p_adjusted:.2g} adjusted)" if self.family > 1 else ""
        note = f"; {self.note}" if self.note else ""
        return f"{numbers}, {self.test} = {self.p:.2g}{adjusted}, {listed(self.seeds)}{note}"

    @property
    def verdict(self) -> str:
        """The numbers and what they establish."""
        return f"{self.statement}: {self.finding}"

    @property
    def finding(self) -> str:
        """The result of the comparison in a few words."""
        if self.established:
            return f"established, larger for {self.larger}"
        return f"not established{self.shortage}"

    @property
    def shortage(self) -> str:
        """That no difference whatever could be established with so few seeds."""
        least = seeds_needed(self.family)
        return f" (needs at least {least} seeds)" if len(self.seeds) < least else ""


def listed(seeds: Sequence[int]) -> str:
    """Seeds as a reader wants them: `seed 3`, `seeds 0–9`, `seeds 0, 2, 5`."""
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"seeds {seeds[0]}–{seeds[-1]}"
    return f"seeds {', '.join(map(str, seeds))}"


def compare(
    values: Mapping[str, Mapping[int, float]], *, scale: Scale = "ratio", level: float = LEVEL
) -> list[Comparison]:
    """Every pair of optimizers on one quantity, paired by seed.

    Established means: at least six common seeds, and a Holm-adjusted exact sign-flip p of at most
    `level`, so that in a study where all optimizers have the same distribution something is claimed
    with probability at most `level`. The hypothesis is symmetric differences, not equal means:
    where means are equal and the distributions differ in skew, up to 11 % of studies claim a
    difference (simulated in the tests). Without an assumption on skew no exact test of a mean
    exists. The interval is Student's t of the paired differences: a percentile bootstrap covers too
    little at these sizes (84 % for 95 % at n = 5, simulated).

    A pair without a common seed, or with a value that is not finite (a search that ended without
    its number) or has no ratio, is not compared: leaving out such seeds would favour one of the
    two. It still counts in the adjustment.

    Args:
        values: Optimizer → seed → value.
        scale: "ratio" for positive quantities that differ by factors (λ_max): differences of
            logarithms. "difference" for accuracies, losses and signed quantities.
        level: Of the family.

    Raises:
        InputError: Fewer than two optimizers.
    """
    if len(values) < 2:
        raise InputError(f"{len(values)} optimizer(s) measured; a comparison needs two")
    pairs = [(a, b, *paired(values, a, b, scale)) for a, b in combinations(values, 2)]
    tests = [math.nan if note else sign_flip_p(d) for *_, d, note in pairs]
    adjusted = holm(tests)
    comparisons = []
    for (a, b, seeds, d, note), p, p_adjusted in zip(pairs, tests, adjusted, strict=True):
        effect, low, high = (math.nan,) * 3 if note else interval(d)
        if scale == "ratio":
            effect, low, high = math.exp(effect), math.exp(low), math.exp(high)
        established = len(seeds) >= FEWEST and p_adjusted <= level
        numbers = (effect, low, high, p, p_adjusted, len(pairs), established)
        comparisons.append(Comparison(a, b, scale, seeds, *numbers, note=note))
    return comparisons


def paired(
    values: Mapping[str, Mapping[int, float]], a: str, b: str, scale: Scale
) -> tuple[tuple[int, ...], np.ndarray, str]:
    """Differences between two optimizers, paired by seed.

    Args:
        values: Optimizer → seed → value.
        a: An optimizer.
        b: Another.
        scale: "ratio" takes differences of logarithms.

    Returns:
        The common seeds, the differences `(n,)`, and the reason why there are none, or "".
    """
    seeds = tuple(sorted(values[a].keys() & values[b].keys()))
    if not seeds:
        return seeds, np.zeros(0), "they have no seed in common"
    for name in (a, b):
        for seed in seeds:
            value = values[name][seed]
            if not math.isfinite(value):
                return seeds, np.zeros(0), f"{name} has the value {value:g} at seed {seed}"
            if scale == "ratio" and value <= 0:
                why = f"{name} has the value {value:g} at seed {seed}, which has no ratio"
                return seeds, np.zeros(0), why
    x, y = (np.array([values[name][seed] for seed in seeds], dtype=float) for name in (a, b))
    return seeds, np.log(x) - np.log(y) if scale == "ratio" else x - y, ""


def sign_flip_p(differences: Sequence[float] | np.ndarray) -> float:
    """Two-sided p of the hypothesis that paired differences are symmetric about zero (Fisher 1935).

    The share of all 2ⁿ sign assignments whose |mean| is at least the observed one: exact up to 20
    differences, beyond that 100,000 random assignments and the observed one (Phipson & Smyth 2010).
    No p is below 2^(1−n). nan for fewer than two differences.
    """
    d = np.asarray(differences, dtype=float)
    n = len(d)
    if n < 2:
        return math.nan
    observed = abs(d.sum())
    slack = 1e-9 * np.abs(d).sum()  # rounding must not turn an equal sum into a smaller one
    if n <= EXACT:
        sums = np.zeros(1)
        for value in d[1:]:  # the first sign is fixed: flipping all changes no |sum|
            sums = np.concatenate([sums + value, sums - value])
        return float((np.abs(sums + d[0]) >= observed - slack).mean())
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(RESAMPLES, n))
    return float((1 + (np.abs(signs @ d) >= observed - slack).sum()) / (1 + RESAMPLES))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values (Holm 1979); nan stays nan and counts as a hypothesis."""
    order = sorted(range(len(p)), key=lambda i: (math.isnan(p[i]), p[i]))
    adjusted, running = [math.nan] * len(p), 0.0
    for rank, i in enumerate(order):
        if not math.isnan(p[i]):
            running = max(running, min(1.0, (len(p) - rank) * p[i]))
            adjusted[i] = running
    return adjusted


def seeds_needed(pairs: int, level: float = LEVEL) -> int:
    """Fewest seeds with which any difference among so many pairs could be established."""
    return max(FEWEST, math.ceil(1 + math.log2(pairs / level)))


def interval(d: np.ndarray, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and Student's t interval of it; nan for fewer than two values."""
    n, mean = len(d), float(d.mean())
    if n < 2:
        return mean, math.nan, math.nan
    half = float(stdtrit(n - 1, (1 + confidence) / 2) * d.std(ddof=1) / math.sqrt(n))
    return mean, mean - half, mean + half


def middle(values: np.ndarray) -> float:
    """Median of the values that are known, infinite ones too; nan where none is."""
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else math.nan
