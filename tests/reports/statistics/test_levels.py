"""Claims about the sign of a number: the exact sign test, and how often it is wrong or right."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lsa.reports.statistics.levels import levels


def test_the_mean_has_students_interval_and_without_errors_nothing_is_tested():
    values = [1.0, 2.0, 4.0, 3.0]
    (found,) = levels({"a": dict(enumerate(values))})
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert (found.mean, found.low, found.high) == pytest.approx((2.5, low, high))
    assert found.verdict == "" and math.isnan(found.p)


def test_only_what_exceeds_its_error_counts_and_p_is_binomial():
    values = {"a": dict(enumerate([3.0, 3, 3, 3, 3, 3, 3, 0.5]))}
    (found,) = levels(values, {"a": dict.fromkeys(range(8), 1.0)})
    assert (found.beyond, found.every) == (7, False)
    assert found.p == pytest.approx(stats.binomtest(7, 8, 0.5, "greater").pvalue)
    assert found.established and "at 7 of 8 seeds" in found.statement
    (below,) = levels(values, {"a": dict.fromkeys(range(8), 1.0)}, side="below 0")
    assert below.beyond == 0 and below.p == 1.0


def test_a_number_below_zero_must_be_so_by_its_error():
    values, errors = {"a": dict.fromkeys(range(6), -1.0)}, {"a": dict.fromkeys(range(6), 0.9)}
    (found,) = levels(values, errors, side="below 0")
    assert found.established and found.every
    (found,) = levels(values, {"a": dict.fromkeys(range(6), 1.1)}, side="below 0")
    assert not found.established and found.beyond == 0


def test_without_an_error_a_number_is_on_no_side():
    values, errors = {"a": dict.fromkeys(range(8), 1e-9)}, dict.fromkeys(range(8), 0.0)
    (found,) = levels(values, {"a": errors | dict.fromkeys(range(6), math.nan)})
    assert (found.beyond, found.unknown, found.established) == (2, 6, False)
    assert "beyond its error at 2 of 8 seeds (not known at 6)" in found.statement


def test_what_is_not_finite_has_a_median_and_no_mean():
    values = {"a": dict(enumerate([math.nan, math.inf, 1.0, 1.0, 3.0, 1.0, 1.0, 1.0]))}
    (found,) = levels(values, {"a": dict.fromkeys(range(8), 0.1)})
    assert found.mean == 1.0 and math.isnan(found.low) and found.beyond == 7
    assert "a: median 1 (6 of 8 finite), above 0 beyond its error at 7 of 8" in found.statement
    (alone,) = levels({"a": {0: math.nan}})
    assert alone.statement == "a: nan, seed 0 alone"


@pytest.mark.parametrize(("seeds", "verdict"), [(1, False), (5, False), (6, True)])
def test_few_seeds_establish_nothing(seeds, verdict):
    (found,) = levels(
        {"a": dict.fromkeys(range(seeds), 1.0)}, {"a": dict.fromkeys(range(seeds), 0)}
    )
    assert found.established is verdict


def test_p_is_adjusted_over_the_subjects():
    ones = dict.fromkeys(range(6), 1.0)
    found = levels(dict.fromkeys("abcd", ones), dict.fromkeys("abcd", dict.fromkeys(range(6), 0.0)))
    assert [one.p_adjusted for one in found] == pytest.approx([4 * 2**-6] * 4)
    assert not any(one.established for one in found)


@pytest.mark.parametrize("n", [6, 10])
def test_of_barriers_that_are_zero_at_most_5_percent_of_studies_claim_one(n):
    """The hardest such case: a median of 0 without regard to the numbers' errors."""
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(2000):
        values = {pair: dict(enumerate(rng.normal(0, 1, n))) for pair in "abc"}
        errors = {pair: dict.fromkeys(range(n), 0.0) for pair in "abc"}
        wrong += any(one.established for one in levels(values, errors))
    assert wrong <= 100 + 3 * math.sqrt(2000 * 0.05 * 0.95)


def test_a_barrier_of_two_deviations_over_the_seeds_is_established_with_ten():
    rng = np.random.default_rng(1)
    right = 0
    for _ in range(500):
        values = {pair: dict(enumerate(rng.normal(2, 1, 10))) for pair in "abc"}
        errors = {pair: dict.fromkeys(range(10), 0.2) for pair in "abc"}
        right += levels(values, errors)[0].established
    assert right >= 0.8 * 500
