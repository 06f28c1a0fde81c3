"""The rule for claims: exact p values, Holm's adjustment, and how often it is wrong or right."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lsa.reports.statistics.comparison import (
    Comparison,
    compare,
    holm,
    listed,
    seeds_needed,
    sign_flip_p,
)
from lsa.runtime.errors import InputError


def by_seed(table: np.ndarray) -> dict[str, dict[int, float]]:
    """Rows are optimizers, columns seeds."""
    return {f"o{i}": dict(enumerate(row)) for i, row in enumerate(table)}


@pytest.mark.parametrize("n", [2, 3, 6, 9])
def test_the_p_value_is_the_exact_permutation_test_of_scipy(n):
    d = np.random.default_rng(n).normal(0.4, 1, n)
    expected = stats.permutation_test(
        (d,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert sign_flip_p(d) == pytest.approx(expected.pvalue)


@pytest.mark.parametrize(("n", "least"), [(3, 0.25), (5, 0.0625), (6, 0.03125), (10, 2**-9)])
def test_the_smallest_p_value_is_set_by_the_number_of_seeds(n, least):
    assert sign_flip_p(np.ones(n)) == least  # ties: rounding must not lose the observed sum
    assert sign_flip_p(0.1 * np.arange(1, n + 1)) == least


def test_many_seeds_are_resampled_and_agree_with_the_t_test():
    d = np.random.default_rng(0).normal(0.5, 1, 30)
    assert sign_flip_p(d) == pytest.approx(stats.ttest_1samp(d, 0).pvalue, rel=0.2)
    assert sign_flip_p(d) == sign_flip_p(d)


def test_holm_against_a_worked_example():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([math.nan, 0.01])[1] == pytest.approx(0.02)


def test_a_ratio_is_a_geometric_mean_with_its_interval():
    (found,) = compare({"a": {0: 2.0, 1: 8.0, 2: 4.0}, "b": {0: 1.0, 1: 2.0, 3: 9.0}})
    assert (found.a, found.b, found.seeds) == ("a", "b", (0, 1))
    assert found.effect == pytest.approx(math.sqrt(2 * 4))
    d = np.log([2, 4])
    low, high = stats.t.interval(0.95, 1, d.mean(), stats.sem(d))
    assert (found.low, found.high) == pytest.approx((math.exp(low), math.exp(high)))
    assert not found.established and "not established" in found.verdict


def test_one_seed_establishes_nothing_however_large_the_difference():
    (found,) = compare({"a": {0: 1e6}, "b": {0: 1.0}})
    assert (
        not found.established and math.isnan(found.p) and "needs at least 6 seeds" in found.verdict
    )


def test_the_number_of_seeds_that_could_establish_anything():
    assert [seeds_needed(m) for m in (1, 3, 6)] == [6, 7, 8]
    for pairs in (1, 3, 6):
        n = seeds_needed(pairs)
        assert pairs * 2.0 ** (1 - n) <= 0.05
        assert n == 6 or pairs * 2.0 ** (2 - n) > 0.05


def established(rng: np.random.Generator, n: int, shift: float, skewed: bool) -> list[Comparison]:
    """A study of three optimizers; seeds shift all three alike, as pairing assumes."""
    noise = rng.exponential(1, (3, n)) if skewed else rng.normal(0, 1, (3, n))
    table = noise / math.sqrt(2) + rng.normal(0, 1, n)  # differences have deviation 1
    table[0] += shift
    return compare(by_seed(np.exp(table)))


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("n", [6, 10])
def test_without_a_difference_at_most_5_percent_of_studies_claim_one(n, skewed):
    rng = np.random.default_rng(0)
    wrong = sum(any(c.established for c in established(rng, n, 0, skewed)) for _ in range(2000))
    # 5 % of 2,000 and three standard deviations
    assert wrong <= 100 + 3 * math.sqrt(2000 * 0.05 * 0.95)


@pytest.mark.parametrize("n", [8, 10])
def test_with_equal_means_and_other_skew_up_to_11_percent_claim_a_difference(n):
    """The test is of symmetric differences: here they have mean 0 and the exponential's skew."""
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(2000):
        table = np.stack([rng.exponential(1, n) - 1, 0.3 * rng.normal(0, 1, n)])
        wrong += compare(by_seed(table), scale="difference")[0].established
    assert 2000 * 0.06 < wrong < 2000 * 0.11


def test_a_large_difference_is_established_with_ten_seeds():
    """d_z = 2: two standard deviations of the paired differences."""
    rng = np.random.default_rng(1)
    right = sum(established(rng, 10, 2.0, False)[0].established for _ in range(500))
    assert right >= 0.8 * 500


def test_the_interval_covers_the_true_ratio_in_95_percent_of_studies(record_property):
    rng = np.random.default_rng(2)
    found = [established(rng, 10, 0.7, False)[0] for _ in range(2000)]
    covered = sum(c.low <= math.exp(0.7) <= c.high for c in found)
    row = ["report: ratio of two optimizers", "10 seeds", "95 %", covered / 2000, 2000]
    record_property("coverage", row)
    assert abs(covered - 1900) <= 3 * math.sqrt(2000 * 0.05 * 0.95)


def test_what_cannot_be_compared_is_said_and_counts_in_the_adjustment():
    """Dropping a seed whose search ended without a number would favour one of the two."""
    same = {seed: float(seed) for seed in range(7)}
    shifted = {seed: seed + 1.0 for seed in range(7)}
    values = {"a": same, "b": shifted, "c": same | {3: math.inf}, "d": {9: 1.0}}
    found = {(c.a, c.b): c for c in compare(values, scale="difference")}
    assert "c has the value inf at seed 3" in found["a", "c"].verdict
    assert "no seed in common" in found["a", "d"].verdict
    assert not found["a", "c"].established and math.isnan(found["a", "c"].p)
    assert found["a", "b"].p_adjusted == pytest.approx(6 * 2**-6)


def test_a_verdict_names_the_seeds_the_interval_and_the_larger_one():
    (found,) = compare({"a": dict.fromkeys(range(6), 1.0), "b": dict.fromkeys(range(6), 2.0)})
    assert found.larger == "b"
    expected = "a/b = 0.5 (95 %: 0.5 … 0.5), exact p = 0.031, seeds 0–5: established, larger for b"
    assert found.verdict == expected
    (equal,) = compare({"a": {0: 1.0, 1: 1.0}, "b": {0: 1.0, 1: 1.0}})
    assert equal.larger == "" and "not established" in equal.verdict


@pytest.mark.parametrize(
    ("seeds", "text"),
    [
        ((3,), "seed 3"),
        ((0, 1), "seeds 0, 1"),
        ((0, 1, 2), "seeds 0–2"),
        ((0, 2, 3), "seeds 0, 2, 3"),
    ],
)
def test_seeds_are_listed(seeds, text):
    assert listed(seeds) == text


def test_one_optimizer_is_refused():
    with pytest.raises(InputError, match="needs two"):
        compare({"a": {0: 1.0}})


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_pair_without_a_ratio_hinders_no_other(value):
    values = {name: dict.fromkeys(range(7), float(i + 1)) for i, name in enumerate("abc")}
    values["a"][3] = value
    found = {(c.a, c.b): c for c in compare(values)}
    assert f"a has the value {value:g} at seed 3, which has no ratio" in found["a", "b"].verdict
    assert not found["a", "b"].established and found["b", "c"].family == 3
    assert found["b", "c"].established
