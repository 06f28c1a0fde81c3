"""Curvature at equal train loss.

Curvature changes while training goes on, so optimizers that stopped at different losses differ in
it for that reason alone. Where the training was measured epoch by epoch, each optimizer's curvature
is taken where its train loss was the same; otherwise an analysis of covariance adjusts for the
loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
from scipy.special import stdtr, stdtrit

from lsa.reports.statistics.comparison import FEWEST, LEVEL, Comparison, holm, paired

TEST = "t-test p"
BySeed = Mapping[str, Mapping[int, float]]  # optimizer → seed → value
Courses = Mapping[str, Mapping[int, Sequence[float]]]  # optimizer → seed → value per epoch


def at_loss(train_loss: Sequence[float], values: Sequence[float], target: float) -> float:
    """A positive quantity at the point where a training first reached a train loss.

    Between the two recorded epochs around it, the logarithm of the value is linear in that of the
    loss, which is exact for a power law.

    Args:
        train_loss: At each recorded epoch.
        values: The quantity at each recorded epoch.
        target: The train loss.

    Returns:
        The value; nan if the loss was not reached, was passed before the first recorded epoch, or a
        number needed is not positive.
    """
    loss, value = np.asarray(train_loss, float), np.asarray(values, float)
    reached = np.flatnonzero(loss <= target * (1 + 1e-9))
    if not len(reached):
        return math.nan
    after = int(reached[0])
    if after == 0:
        return float(value[0]) if math.isclose(loss[0], target) else math.nan
    around = slice(after - 1, after + 1)
    if not (loss[around] > 0).all() or not (value[around] > 0).all():
        return math.nan
    (l0, l1), (v0, v1) = np.log(loss[around]), np.log(value[around])
    share = min(1.0, (l0 - math.log(target)) / (l0 - l1))
    return math.exp(v0 + share * (v1 - v0))


def at_common_loss(losses: Courses, values: Courses) -> tuple[dict[str, dict[int, float]], list]:
    """A quantity of every optimizer where all had the same train loss, seed by seed.

    That loss is the largest final one among the optimizers at that seed, the only one that every
    training has reached.

    Returns:
        Optimizer → seed → value, and one plain line for every value that could not be had.
    """
    matched: dict[str, dict[int, float]] = {name: {} for name in losses}
    left_out = []
    for seed in sorted({seed for by_seed in losses.values() for seed in by_seed}):
        of_seed = {name: by_seed[seed] for name, by_seed in losses.items() if seed in by_seed}
        target = max(losses_of[-1] for losses_of in of_seed.values())
        for name, losses_of in of_seed.items():
            value = at_loss(losses_of, values[name][seed], target)
            if math.isfinite(value):
                matched[name][seed] = value
            else:
                left_out.append(
                    f"{name} at seed {seed}: no usable value around the train loss {target:.3g} "
                    f"(its records begin at {losses_of[0]:.3g})"
                )
    return matched, left_out


def ancova(values: BySeed, losses: BySeed, *, level: float = LEVEL) -> list[Comparison]:
    """Pairs of optimizers on a positive quantity, adjusted for train loss by covariance.

    Over the seeds of a pair, log(value_a/value_b) is regressed on log(loss_a/loss_b); the intercept
    is the log ratio at equal loss, with Student's t of n − 2 degrees of freedom, adjusted by Holm.
    Nothing is established with fewer than six seeds, nor by extrapolation, where equal loss lies
    outside the measured ratios of losses.

    Args:
        values: Optimizer → seed → value of the quantity.
        losses: Optimizer → seed → train loss.
        level: Of the test.
    """
    comparisons = [_adjusted(values, losses, a, b) for a, b in combinations(values, 2)]
    adjusted = holm([comparison.p for comparison in comparisons])
    return [
        replace(
            comparison,
            p_adjusted=p,
            family=len(comparisons),
            established=not comparison.note and len(comparison.seeds) >= FEWEST and p <= level,
        )
        for comparison, p in zip(comparisons, adjusted, strict=True)
    ]


def _adjusted(values: BySeed, losses: BySeed, a: str, b: str) -> Comparison:
    """One pair; a note says why there is no ratio or why it is an extrapolation."""
    seeds, y, note = paired(values, a, b, "ratio")
    loss_seeds, x, loss_note = paired(losses, a, b, "ratio")
    n = len(seeds)
    centred = x - x.mean() if len(x) else x
    spread = float(centred @ centred)
    if not note:
        if loss_note or seeds != loss_seeds:
            note = "a train loss is missing"
        elif n < FEWEST:
            note = f"ANCOVA needs {FEWEST} seeds, there are {n}"
        elif spread <= 1e-12 * float(x @ x):
            note = "the ratio of their train losses is the same at every seed"
    if note:
        return Comparison(a, b, "ratio", seeds, test=TEST, note=note)
    slope = float(centred @ y) / spread
    effect = float(y.mean() - slope * x.mean())
    residuals = y - effect - slope * x
    error = math.sqrt(float(residuals @ residuals) / (n - 2) * (1 / n + x.mean() ** 2 / spread))
    half = float(stdtrit(n - 2, 0.975)) * error
    p = 2 * float(stdtr(n - 2, -abs(effect) / error)) if error else float(effect == 0)
    if x.min() > 0 or x.max() < 0:
        higher = a if x.min() > 0 else b
        note = f"extrapolated, since {higher} had the higher train loss at every seed"
    ends = (math.exp(v) for v in (effect, effect - half, effect + half))
    return Comparison(a, b, "ratio", seeds, *ends, p=p, test=TEST, note=note)
