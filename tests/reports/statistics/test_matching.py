"""Curvature at equal train loss, against trainings whose λ(loss) is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lsa.reports.statistics.comparison import compare
from lsa.reports.statistics.matching import ancova, at_common_loss, at_loss


def test_a_power_law_is_interpolated_exactly():
    loss = np.array([2.0, 0.9, 0.5, 0.11, 0.02])
    values = 7 * loss**0.4
    for target in (1.3, 0.9, 0.2, 0.02):
        assert at_loss(loss, values, target) == pytest.approx(7 * target**0.4)


def test_the_first_crossing_counts_where_the_loss_rises_again():
    loss, values = [1.0, 0.1, 0.5, 0.05], [8.0, 4.0, 100.0, 1.0]
    expected = math.exp(np.interp(math.log(0.4), np.log([0.1, 1.0]), np.log([4.0, 8.0])))
    assert at_loss(loss, values, 0.4) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("loss", "values", "target"),
    [
        ([1.0, 0.5], [2.0, 1.0], 0.1),  # not reached
        ([1.0, 0.5], [2.0, 1.0], 1.5),  # passed before the first record
        ([1.0, 0.5], [2.0, -1.0], 0.7),  # no logarithm
        ([1.0, 0.5], [2.0, math.nan], 0.7),
    ],
)
def test_what_was_not_measured_is_not_made_up(loss, values, target):
    assert math.isnan(at_loss(loss, values, target))


def test_the_first_record_itself_may_be_the_loss():
    assert at_loss([1.0, 0.5], [2.0, 1.0], 1.0) == 2.0


def courses(scales: dict[str, float], rates: dict[str, float], seeds: int, noise: float = 0.0):
    """Trainings with λ = scale · L^½, each optimizer descending at a rate of its own."""
    rng = np.random.default_rng(0)
    losses: dict[str, dict[int, list[float]]] = {}
    values: dict[str, dict[int, list[float]]] = {}
    for name, scale in scales.items():
        for seed in range(seeds):
            epochs = np.arange(1, 21) * (1 + 0.05 * rng.random())
            loss = 2 * np.exp(-rates[name] * epochs)
            factor = math.exp(noise * rng.normal())
            losses.setdefault(name, {})[seed] = loss.tolist()
            values.setdefault(name, {})[seed] = (factor * scale * np.sqrt(loss)).tolist()
    return losses, values


def test_matching_recovers_the_ratio_that_the_last_epoch_gets_wrong():
    """a is flatter at every loss, and sharper at the last epoch because it has learnt less."""
    scales, rates = {"a": 10.0, "b": 20.0}, {"a": 0.1, "b": 0.4}
    losses, values = courses(scales, rates, 6)
    last = {name: {s: v[-1] for s, v in by_seed.items()} for name, by_seed in values.items()}
    assert compare(last)[0].larger == "a"
    found, left_out = at_common_loss(losses, values)
    assert left_out == []
    for seed in range(6):
        assert found["a"][seed] / found["b"][seed] == pytest.approx(0.5)
        assert found["a"][seed] == pytest.approx(values["a"][seed][-1])  # the slowest one's end
    assert compare(found)[0].larger == "b"


def test_an_optimizer_that_had_passed_the_loss_before_its_first_record_is_named():
    losses = {"a": {0: [2.0, 1.0]}, "b": {0: [0.5, 0.1]}}
    found, left_out = at_common_loss(losses, {"a": {0: [5.0, 4.0]}, "b": {0: [3.0, 2.0]}})
    assert found == {"a": {0: 4.0}, "b": {}}
    assert left_out == [
        "b at seed 0: no usable value around the train loss 1 (its records begin at 0.5)"
    ]


# --- covariance -----------------------------------------------------------------------------------


def table(rng, n: int, ratio: float, gap: float) -> tuple[dict, dict]:
    """Final values λ = ratio · L^½ · noise of two optimizers whose losses differ by e^gap."""
    losses, values = {}, {}
    for name, shift in (("a", gap), ("b", 0.0)):
        log_loss = rng.normal(shift, 1, n)
        log_value = 0.5 * log_loss + rng.normal(0, 0.3, n)
        log_value += math.log(ratio) if name == "a" else 0
        losses[name] = dict(enumerate(np.exp(log_loss)))
        values[name] = dict(enumerate(np.exp(log_value)))
    return values, losses


def test_the_adjusted_ratio_is_the_intercept_of_the_regression():
    values, losses = table(np.random.default_rng(0), 9, 2.0, 0.5)
    (found,) = ancova(values, losses)
    x, y = (
        np.log(list(of["a"].values())) - np.log(list(of["b"].values())) for of in (losses, values)
    )
    fit = stats.linregress(x, y)
    assert found.effect == pytest.approx(math.exp(fit.intercept))
    assert found.p == pytest.approx(2 * stats.t.sf(abs(fit.intercept / fit.intercept_stderr), 7))
    half = stats.t.ppf(0.975, 7) * fit.intercept_stderr
    assert (found.low, found.high) == pytest.approx(
        (math.exp(fit.intercept - half), math.exp(fit.intercept + half))
    )


def test_a_difference_that_is_only_the_losses_is_claimed_in_at_most_5_percent_of_studies():
    rng = np.random.default_rng(1)
    wrong = raw = 0
    for _ in range(2000):
        values, losses = table(rng, 10, 1.0, 2.0)
        wrong += ancova(values, losses)[0].established
        raw += compare(values)[0].established
    assert wrong <= 100 + 3 * math.sqrt(2000 * 0.05 * 0.95)
    assert raw > 1000  # which is what the adjustment is for


def test_a_difference_at_equal_loss_is_found():
    rng = np.random.default_rng(2)
    right = 0
    for _ in range(300):
        values, losses = table(rng, 10, 3.0, 0.0)
        found = ancova(values, losses)[0]
        right += found.established and found.larger == "a"
    assert right >= 0.8 * 300


def test_an_extrapolation_establishes_nothing():
    loss = {"a": {s: 10.0 + s for s in range(8)}, "b": {s: 0.1 + 0.02 * s for s in range(8)}}
    value = {
        k: {s: (9 if k == "a" else 1) * v**0.5 for s, v in of.items()} for k, of in loss.items()
    }
    (found,) = ancova(value, loss)
    assert found.effect == pytest.approx(9) and found.p < 1e-6
    assert not found.established
    assert "extrapolated, since a had the higher train loss at every seed" in found.statement


@pytest.mark.parametrize(
    ("n", "losses", "note"),
    [
        (5, [1, 2, 3, 4, 5], "ANCOVA needs 6 seeds, there are 5"),
        (6, [2, 2, 2, 2, 2, 2], "the ratio of their train losses is the same at every seed"),
    ],
)
def test_what_covariance_cannot_adjust_is_said(n, losses, note):
    values = {name: {s: 1.0 + s for s in range(n)} for name in "ab"}
    loss = {"a": dict(enumerate(map(float, losses))), "b": dict.fromkeys(range(n), 1.0)}
    (found,) = ancova(values, loss)
    assert note in found.statement and not found.established
