"""Quotients of means and their intervals: Fieller's formula, known cases, how often they hold."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.special import stdtrit
from torch import Tensor

from lsa.landscape.noise_scale import of_gram
from lsa.maths.ratios import quotient

F64 = torch.float64


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=F64)


def fieller(over: Tensor, under: Tensor) -> tuple[float, float]:
    """Both ends by the quadratic equation (Fieller 1954)."""
    n = len(over)
    t = float(stdtrit(n - 1, 0.975))
    (aa, ab), (_, bb) = (torch.cov(torch.stack([over, under])) * (t * t / n)).tolist()
    a, b = float(over.mean()), float(under.mean())
    middle, square = a * b - ab, b * b - bb
    half = math.sqrt(middle**2 - square * (a * a - aa))
    return (middle - half) / square, (middle + half) / square


def test_without_skewness_it_is_fiellers():
    a, b = normal(30), normal(30, seed=1)
    over, under = 3 + torch.cat([a, -a]), 2 + torch.cat([b, -b])
    found = quotient(over, under)
    assert (found.low, found.high) == pytest.approx(fieller(over, under), rel=1e-9)
    assert found.value == pytest.approx(float(over.mean() / under.mean()), rel=1e-12)


@pytest.mark.parametrize("unit", [1e-12, 1.0, 1e12])
def test_it_scales_with_the_units_of_both(unit):
    over, under = 3 + normal(20).square(), 2 + normal(20, seed=1).square()
    found, scaled = quotient(over, under), quotient(over * unit, under / unit)
    assert [v / unit**2 for v in scaled] == pytest.approx(list(found), rel=1e-9)


def test_of_a_quotient_that_all_samples_have_both_ends_are_it():
    under = 1 + 0.1 * normal(40)
    assert list(quotient(3 * under, under)) == pytest.approx([3, 3, 3])
    assert list(quotient(torch.full((5,), 6.0), torch.full((5,), 2.0))) == pytest.approx([3, 3, 3])


def test_where_the_denominator_is_not_told_from_zero_there_is_no_upper_end():
    over, noise = 3 + normal(50), normal(50, seed=1)
    for mean in (-0.05, 0.0, 0.05):
        found = quotient(over, noise - noise.mean() + mean)
        assert math.isnan(found.value) and found.high == math.inf and 2 < found.low < math.inf
        assert found.named("x").keys() == {"x_low"}
    assert quotient(torch.zeros(5), torch.zeros(5)).named("x") == {}


def test_a_larger_variance_of_the_denominator_lowers_the_lower_end_alone():
    over, under = 3 + normal(50), 2 + normal(50, seed=1)
    found = quotient(over, under)
    wider = quotient(over, under, least=lambda size: 0.1 * size)
    assert wider.low < found.low and wider.high == found.high
    assert quotient(over, under, least=lambda size: 0.0) == found


LAWS = {
    "normal": lambda n, d, rng: torch.randn(n, d, generator=rng, dtype=F64),
    "skewed": lambda n, d, rng: -torch.rand(n, d, generator=rng, dtype=F64).log() - 1,
    # Samples of unlike size: the squares of their gradients have a kurtosis of 9.
    "heavy": lambda n, d, rng: (
        torch.randn(n, d, generator=rng, dtype=F64)
        * (0.5 * torch.randn(n, 1, generator=rng, dtype=F64) - 0.25).exp()
    ),
}
SETS, DIMENSION = 400, 50
SIGNALS = {"weak": 0.3, "middling": 2.0, "strong": 30.0}  # N|G|²/tr C


@pytest.mark.full
@pytest.mark.parametrize("direction", ["sharpest", "all"])
@pytest.mark.parametrize("strength", SIGNALS)
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("parts", "size"), [(200, 1), (50, 1), (8, 32)])
def test_the_interval_of_a_noise_scale_covers_it(
    parts, size, law, strength, direction, record_property
):
    """Noise of variances 1/i along d axes: G along the first of them, or along all alike."""
    n, d, rng = parts * size, DIMENSION, torch.Generator().manual_seed(0)
    scales = torch.arange(1, d + 1, dtype=F64).rsqrt()
    scales /= scales.square().sum().sqrt()  # tr C = 1
    G = torch.zeros(d, dtype=F64)
    G[0 if direction == "sharpest" else slice(None)] = 1
    G *= math.sqrt(SIGNALS[strength] / n) / G.norm()
    truth = n / SIGNALS[strength]
    inside, printed, right = 0, 0, 0
    for _ in range(SETS):
        g = (G + scales * LAWS[law](n, d, rng)).view(parts, size, d).mean(1)
        found = of_gram(g @ g.T, size, n).scale
        covers = found.low <= truth <= found.high
        inside += covers
        printed += found.bounded
        right += found.bounded and covers
    if printed:
        label = f"noise scale, {parts} gradients of {size}, {law}, {strength}, {direction}"
        beside = f"{label}; printed in {printed}, of these inside {right / printed:.0%}"
    else:
        beside = f"noise scale, {parts} of {size}, {law}, {strength}, {direction}; never printed"
    record_property("coverage", [beside, "data", "95 %", inside / SETS, SETS])
    assert inside / SETS >= 0.93 - 3 * math.sqrt(0.93 * 0.07 / SETS)
