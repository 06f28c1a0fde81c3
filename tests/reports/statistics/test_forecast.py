"""The forecast of seeds against simulated studies."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lsa.reports.statistics.comparison import compare, seeds_needed, sign_flip_p
from lsa.reports.statistics.forecast import POWER, forecast, needed, power, standardised


@pytest.mark.parametrize(
    ("effect", "family"), [(0.7, 1), (1.0, 3), (1.3, 1), (1.6, 3), (2.5, 3), (6.0, 3)]
)
def test_as_many_seeds_as_forecast_establish_in_four_of_five_studies(effect, family):
    found = needed(effect, family)
    rng = np.random.default_rng(7)

    def share(n: int) -> float:
        studies = rng.normal(effect, 1, (400, n))
        return float(np.mean([sign_flip_p(d) <= 0.05 / family for d in studies]))

    assert share(found.seeds) >= POWER - 0.06  # three standard errors of 400 studies
    fewer = found.seeds - 1
    if fewer >= seeds_needed(family):
        assert share(fewer) <= POWER + 0.06
    else:
        assert found.seeds == seeds_needed(family)


def test_both_ways_to_the_power_meet_where_one_takes_over():
    for effect in (0.9, 1.1):
        simulated, students = power(effect, 11, 0.05), power(effect, 12, 0.05)
        assert 0 < students - simulated < 0.12


def differing(n: int, mean: float, spread: float) -> dict[str, dict[int, float]]:
    """λ of a over b: e^mean on average, with that spread."""
    rng = np.random.default_rng(n)
    noise = rng.normal(0, 1, n)
    noise = (noise - noise.mean()) / noise.std(ddof=1) * spread
    return {"a": dict(enumerate(np.exp(mean + noise))), "b": dict.fromkeys(range(n), 1.0)}


@pytest.mark.parametrize("scale", ["ratio", "difference"])
def test_the_spread_is_read_off_the_interval(scale):
    values = differing(5, 0.3, 0.2)
    if scale == "difference":
        values = {k: {s: math.log(v) for s, v in of.items()} for k, of in values.items()}
    (found,) = compare(values, scale=scale)
    assert standardised(found) == pytest.approx(1.5)
    outlook = forecast(found)
    assert outlook is not None and outlook.seeds == needed(1.5, 1).seeds > 5


def test_without_a_spread_or_a_difference_there_is_no_forecast():
    (two,) = compare(differing(2, 1.0, 0.1))
    assert forecast(two) is None
    (alike,) = compare({"a": {0: 1.0, 1: 1.0, 2: 1.0}, "b": {0: 1.0, 1: 1.0, 2: 1.0}})
    assert forecast(alike) is None


def test_what_no_study_could_afford_is_called_out_of_reach():
    assert needed(0.05, 3).seeds == 0
