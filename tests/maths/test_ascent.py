"""Projected ascent against maxima on a ball that are known: linear, quadratic, inside the ball."""

from __future__ import annotations

import math

import pytest
import torch
from quadratics import highest
from torch import Tensor

from lsa.maths.ascent import Function, ascend, dot, length
from lsa.runtime.errors import InputError

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quadratic(H: Tensor, g: Tensor) -> Function:
    return lambda x: (dot(g, x) + dot(x, H @ x) / 2, g + H @ x)


def symmetric(d: int, seed: int = 1) -> Tensor:
    A = normal(d, d, seed=seed)
    return (A + A.T) / 2


def test_a_linear_function_is_highest_along_its_gradient():
    g = normal(30)
    found = ascend(quadratic(torch.zeros(30, 30, dtype=torch.float64), g), normal(30, seed=2), 0.3)
    assert found.converged and found.value == pytest.approx(0.3 * g.norm().item(), rel=1e-3)
    assert length(found.x) == pytest.approx(0.3)


def test_at_a_minimum_it_is_half_the_top_eigenvalue_times_the_squared_radius():
    H = symmetric(40) @ symmetric(40).T
    found = ascend(quadratic(H, torch.zeros(40, dtype=torch.float64)), normal(40, seed=2), 0.1)
    exact = torch.linalg.eigvalsh(H)[-1].item() * 0.1**2 / 2
    assert found.converged and exact * 0.99 < found.value <= exact * (1 + 1e-12)


@pytest.mark.parametrize("radius", [0.01, 0.3, 3.0])
def test_indefinite_quadratics_reach_the_root_of_the_secular_equation(radius):
    for seed in range(8):
        H, g = symmetric(40, seed=10 + seed), normal(40, seed=30 + seed)
        runs = [ascend(quadratic(H, g), normal(40, seed=s), radius, tol=1e-6) for s in (1, 2)]
        best = max(run.value for run in runs)
        exact = highest(H, g, radius)
        assert exact * (1 - 1e-3) < best <= exact * (1 + 1e-9)


def test_a_maximum_inside_the_ball_is_found():
    H, g = -torch.eye(20, dtype=torch.float64), normal(20)
    g = g / g.norm()
    found = ascend(quadratic(H, g), normal(20, seed=2), 2.0)
    assert found.converged and found.value == pytest.approx(0.5, rel=1e-3)
    assert length(found.x) == pytest.approx(1, abs=0.05)


def test_values_never_fall_and_every_point_is_inside():
    seen: list[tuple[float, float]] = []
    f = quadratic(symmetric(40), normal(40))

    def watched(x: Tensor) -> tuple[float, Tensor]:
        value, gradient = f(x)
        seen.append((value, length(x)))
        return value, gradient

    found = ascend(watched, normal(40, seed=2), 0.7, tol=1e-8, max_evaluations=25)
    assert len(seen) == found.evaluations <= 25
    assert found.value == max(value for value, _ in seen)
    assert all(far <= 0.7 * (1 + 1e-12) for _, far in seen)


def test_what_it_could_not_finish_is_flagged():
    found = ascend(quadratic(symmetric(40), normal(40)), normal(40, seed=2), 0.7, max_evaluations=2)
    assert not found.converged and found.gap > 1e-3 * found.value and found.evaluations == 2


def test_a_function_that_overflows_is_not_climbed():
    def cliff(x: Tensor) -> tuple[float, Tensor]:
        value = float(x[0])
        return (value, torch.eye(3, dtype=x.dtype)[0]) if value < 0.4 else (math.inf, x)

    start = torch.zeros(3, dtype=torch.float64)
    found = ascend(cliff, start, 1.0, max_evaluations=30)
    assert 0.3 < found.value < 0.4 and not found.converged
    with pytest.raises(InputError, match="not finite at distance 1"):
        ascend(cliff, start + torch.tensor([1.0, 0, 0]), 1.0)


@pytest.mark.parametrize(
    "options", [{"radius": 0.0}, {"radius": math.inf}, {"tol": 0.0}, {"max_evaluations": 0}]
)
def test_refusals(options):
    given = {"radius": 1.0} | options
    with pytest.raises(InputError, match="choose all of"):
        ascend(quadratic(symmetric(3), normal(3)), normal(3), **given)


@pytest.mark.parametrize("seed", range(4))
def test_on_a_kink_it_settles_at_the_top_of_the_ridge(seed):
    """f = a·x − c |b·x| is highest where b·x = 0, and its gradient is nowhere a's part in there."""
    a, b = normal(30), normal(30, seed=1)
    b = b / b.norm()

    def ridge(x: Tensor) -> tuple[float, Tensor]:
        side = math.copysign(1, dot(b, x))
        return dot(a, x) - 9 * abs(dot(b, x)), a - 9 * side * b

    found = ascend(ridge, normal(30, seed=2 + seed), 0.3)
    exact = 0.3 * (a - dot(a, b) * b).norm().item()
    assert found.settled and not found.converged and found.gap > 0.1 * found.value
    assert found.evaluations < 60
    assert exact * 0.99 < found.value <= exact * (1 + 1e-12)


def test_slow_growth_is_not_taken_for_the_top():
    """From next to a saddle, f grows by a constant factor a step: little, but not relative to f."""
    H = torch.diag(torch.tensor([1.0, 0.9] + [0.0] * 8, dtype=torch.float64))
    start = torch.full((10,), 1.0, dtype=torch.float64)
    start[0] = 1e-4
    found = ascend(quadratic(H, torch.zeros(10, dtype=torch.float64)), start, 1.0)
    assert found.value > 0.5 * 0.9 * (1 - 1e-2)
