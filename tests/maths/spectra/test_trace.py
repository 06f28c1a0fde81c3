"""Trace estimates: unbiased, with the predicted variance and intervals that cover the truth."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from torch import Tensor

from lsa.maths.spectra.trace import Estimate, hutchinson_trace, hutchpp_trace, mean, rademacher
from lsa.runtime.errors import InputError

F64 = {"dtype": torch.float64}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def symmetric(d: int) -> Tensor:
    A = normal(d, d)
    return A + A.T + 3 * torch.eye(d, dtype=torch.float64)


def decaying(d: int) -> Tensor:
    """Positive semidefinite with eigenvalues 1/i²."""
    Q = torch.linalg.qr(normal(d, d)).Q
    return (Q * (1 / torch.arange(1, d + 1).double() ** 2)) @ Q.T


def covered(estimates: list[Estimate], truth: float) -> float:
    inside = [low <= truth <= high for low, high in (e.interval() for e in estimates)]
    return sum(inside) / len(inside)


def test_interval_is_student_t() -> None:
    x = normal(7)
    low, high = mean(x).interval(0.9)
    expected = scipy.stats.t.interval(0.9, 6, float(x.mean()), float(x.std()) / math.sqrt(7))
    assert (low, high) == pytest.approx(expected)
    assert mean(x[:1]).interval() == (-math.inf, math.inf)


def test_rademacher_is_signs_of_mean_zero() -> None:
    v = rademacher(10_000, generator(), torch.float32, "cpu")
    assert v.dtype == torch.float32
    assert set(v.tolist()) == {-1.0, 1.0}
    assert abs(float(v.mean())) < 4 / math.sqrt(10_000)


def test_unbiased_with_the_predicted_variance() -> None:
    A = symmetric(40)
    n = 2000
    estimate = hutchinson_trace(lambda v: A @ v, 40, rng=generator(), probes=n, **F64)
    variance = 2 * float(A.square().sum() - A.diagonal().square().sum())
    assert estimate.value == pytest.approx(float(A.trace()), abs=4 * math.sqrt(variance / n))
    # sample variance of n nearly normal values: relative standard deviation √(2/n)
    assert estimate.error**2 * n == pytest.approx(variance, rel=5 * math.sqrt(2 / n))


def test_exact_for_a_diagonal_matrix() -> None:
    diagonal = torch.linspace(-2, 5, 30).double()
    estimate = hutchinson_trace(lambda v: diagonal * v, 30, rng=generator(), probes=3, **F64)
    assert estimate.value == pytest.approx(45)
    assert estimate.error == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("probes", [4, 10])
def test_interval_covers_the_trace(probes: int) -> None:
    A = symmetric(30)
    rng = generator(1)
    runs = [
        hutchinson_trace(lambda v: A @ v, 30, rng=rng, probes=probes, **F64) for _ in range(500)
    ]
    # 95 % nominal; 500 repeats have a standard deviation of 1 %
    assert 0.90 <= covered(runs, float(A.trace())) <= 0.99


@pytest.mark.parametrize("tol", [0.5, 0.15])
def test_interval_covers_the_trace_when_the_number_of_probes_is_chosen(tol: float) -> None:
    A = symmetric(30)
    rng = generator(2)
    count = [0]

    def product(v: Tensor) -> Tensor:
        count[0] += 1
        return A @ v

    runs = [
        hutchinson_trace(product, 30, rng=rng, tol=tol, probes=10, max_probes=5000, **F64)
        for _ in range(200)
    ]
    assert 0.90 <= covered(runs, float(A.trace()))  # standard deviation 1.5 %
    width = sum(high - low for low, high in (r.interval() for r in runs)) / len(runs) / 2
    assert width <= 1.2 * tol * float(A.trace())  # relative to the trace as the first stage saw it
    assert count[0] > 10 * 200  # the second stage was needed


def test_a_budget_too_small_leaves_the_interval_wide() -> None:
    A = symmetric(30)
    estimate = hutchinson_trace(
        lambda v: A @ v, 30, rng=generator(), tol=1e-4, probes=10, max_probes=20, **F64
    )
    low, high = estimate.interval()
    assert high - low > 2 * 1e-4 * float(A.trace())
    assert estimate.error > 0


@pytest.mark.parametrize("k", [1, 3])
def test_exact_on_a_known_subspace(k: int) -> None:
    A = decaying(100)
    Q = torch.linalg.eigh(A).eigenvectors.flip(1)[:, :k]
    plain = hutchinson_trace(lambda v: A @ v, 100, rng=generator(), **F64)
    better = hutchinson_trace(lambda v: A @ v, 100, rng=generator(), subspace=Q, **F64)
    assert better.value == pytest.approx(float(A.trace()), abs=5 * better.error)
    # the variance left is that of the rest, 2 ∑ λᵢ² over i > k, up to sampling of two variances
    ratio = math.sqrt(
        sum(1 / i**4 for i in range(k + 1, 101)) / sum(1 / i**4 for i in range(1, 101))
    )
    assert better.error / plain.error < 2 * ratio
    everything = torch.linalg.eigh(A).eigenvectors
    exact = hutchinson_trace(lambda v: A @ v, 100, rng=generator(), subspace=everything, **F64)
    assert exact.value == pytest.approx(float(A.trace()), rel=1e-12)


def test_hutchpp_is_unbiased_and_beats_hutchinson_at_equal_cost() -> None:
    A, truth = decaying(100), float(decaying(100).trace())
    count = [0]

    def product(v: Tensor) -> Tensor:
        count[0] += 1
        return A @ v

    rng = generator(5)
    runs = [hutchpp_trace(product, 100, rng=rng, products=30, **F64) for _ in range(60)]
    assert count[0] == 60 * 30
    plain = [hutchinson_trace(product, 100, rng=rng, probes=30, **F64) for _ in range(60)]
    errors, plain_errors = (
        torch.tensor([e.value - truth for e in estimates]) for estimates in (runs, plain)
    )
    assert abs(float(errors.mean())) < 4 * float(errors.std()) / math.sqrt(60)
    assert float(errors.square().mean().sqrt()) < 0.2 * float(plain_errors.square().mean().sqrt())
    assert covered(runs, truth) >= 0.85  # standard deviation 2.8 %


@pytest.mark.parametrize("matrix", [torch.zeros(20, 20), torch.eye(20)], ids=["zero", "identity"])
def test_hutchpp_of_trivial_matrices(matrix: Tensor) -> None:
    estimate = hutchpp_trace(lambda v: matrix @ v, 20, rng=generator(), products=90)
    assert estimate.value == pytest.approx(float(matrix.trace()), abs=1e-4)


def test_single_probe_has_no_error() -> None:
    estimate = hutchinson_trace(lambda v: v, 5, rng=generator(), probes=1)
    assert estimate.value == pytest.approx(5) and math.isnan(estimate.error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probes": 0}, "probes=0"),
        ({"tol": 0.0}, "tol=0"),
        ({"tol": 0.1, "probes": 1}, "probes=1"),
        ({"tol": 0.1, "max_probes": 3}, "max_probes=3"),
        ({"subspace": torch.ones(5, 2)}, "orthonormal"),
        ({"subspace": torch.eye(4)}, "4 rows"),
    ],
)
def test_options_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        hutchinson_trace(lambda v: v, 5, rng=generator(), **options)


@pytest.mark.parametrize("estimator", [hutchinson_trace, hutchpp_trace])
def test_diverged_operator(estimator) -> None:
    with pytest.raises(InputError, match="not finite"):
        estimator(lambda v: v * math.inf, 5, rng=generator())


def test_too_few_products_for_hutchpp() -> None:
    with pytest.raises(InputError, match="products=5"):
        hutchpp_trace(lambda v: v, 5, rng=generator(), products=5)
