"""Where accuracy crosses a threshold: known intrinsic dimensions, and the interval's coverage."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from sklearn.isotonic import isotonic_regression

from lsa.maths.crossing import crossing, isotonic, search
from lsa.maths.subspaces import KINDS, make_projection
from lsa.runtime.errors import InputError


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def step(at: int, runs: int = 2) -> Callable[[int], list[float]]:
    """Accuracy 1 from dimension `at` on."""
    return lambda d: [float(d >= at)] * runs


# --- the monotone fit -----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 40])
@pytest.mark.parametrize("seed", range(5))
def test_isotonic_agrees_with_scikit_learn(n: int, seed: int) -> None:
    y = normal(n, seed=seed) + torch.linspace(0, 2, n, dtype=torch.float64)
    expected = torch.from_numpy(isotonic_regression(y.numpy()))
    assert torch.allclose(isotonic(y), expected, rtol=0, atol=1e-12)


def test_isotonic_keeps_what_is_monotone() -> None:
    y = torch.tensor([0.1, 0.1, 0.5, 0.9], dtype=torch.float64)
    assert torch.allclose(isotonic(y), y, rtol=0, atol=1e-15)


# --- the crossing ---------------------------------------------------------------------------------


def test_interpolates_in_log_dimension() -> None:
    d = torch.tensor([10, 1000])
    found = crossing(d, torch.tensor([[0.0, 1.0], [0.0, 1.0]]), 0.5)
    assert (found.dimension, found.low, found.high) == (100, 100, 100)
    assert found.notes == ()


def test_a_dimension_that_just_reaches_the_threshold_counts() -> None:
    found = crossing(
        torch.tensor([7, 10, 13]), torch.tensor([[0.2, 0.9, 1.0]], dtype=torch.float64), 0.9
    )
    assert found.dimension == 10


def test_a_dip_does_not_move_the_crossing_to_a_lucky_value() -> None:
    # The value at 8 is above the threshold, but pooled with its neighbour it is not.
    found = crossing(torch.tensor([4, 8, 16, 32]), torch.tensor([[0.1, 0.95, 0.3, 1.0]]), 0.9)
    assert 16 < found.dimension <= 32


def test_not_reached_is_infinite_and_said() -> None:
    found = crossing(torch.tensor([2, 4]), torch.tensor([[0.1, 0.2], [0.1, 0.3]]), 0.9)
    assert math.isinf(found.dimension) and math.isinf(found.high)
    assert "not reached up to d=4 (best mean 0.25)" in found.notes[0]


def test_reached_at_once_is_an_upper_bound_and_said() -> None:
    found = crossing(torch.tensor([8, 16]), torch.tensor([[0.95, 1.0], [0.96, 1.0]]), 0.9)
    assert (found.dimension, found.low) == (8, 1)
    assert "smallest dimension tried, 8, already reaches" in found.notes[0]


def test_one_subspace_gives_no_interval() -> None:
    found = crossing(torch.tensor([8, 16]), torch.tensor([[0.2, 1.0]]), 0.9)
    assert 8 < found.dimension <= 16
    assert math.isnan(found.low) and math.isnan(found.high)
    assert "no interval" in found.notes[0]


def test_noise_at_the_top_leaves_the_interval_open() -> None:
    accuracies = torch.tensor([[0.1, 0.2, 0.99], [0.1, 0.2, 0.91]])
    found = crossing(torch.tensor([2, 4, 8]), accuracies, 0.9)
    assert found.dimension <= 8 and math.isinf(found.high)
    assert "no upper limit" in found.notes[0]


@pytest.mark.parametrize("runs", [3, 10])
@pytest.mark.parametrize("peaked", [False, True])
def test_interval_covers_the_truth(runs: int, peaked: bool, record_property) -> None:
    d = torch.tensor([50, 100, 150, 200, 250, 300, 400, 800])
    x = d.double().log()
    slope = 1.2
    mean = torch.sigmoid(slope * (x - math.log(100)))
    threshold = torch.sigmoid(torch.tensor(slope * math.log(2.5))).item()  # at d = 250
    spread = 0.02 + 0.05 * peaked * torch.exp(-((x - math.log(250)) ** 2))
    trials, covered = 300, 0
    for seed in range(trials):
        y = mean + spread * normal(runs, len(d), seed=seed)
        found = crossing(d, y, threshold)
        covered += found.low <= 250 <= found.high
    label = f"intrinsic dimension, {runs} subspaces{', uneven noise' if peaked else ''}"
    record_property("coverage", [label, "subspaces", "at least 95 %", covered / trials, trials])
    # At least 95 % is claimed; three binomial standard errors below it.
    assert covered / trials > 0.95 - 3 * math.sqrt(0.95 * 0.05 / trials)


@pytest.mark.parametrize(
    ("d", "accuracies", "message"),
    [
        ([1, 2], [[0.1, 0.2, 0.3]], "one row per subspace"),
        ([1, 2], [0.1, 0.2], "one row per subspace"),
        ([2, 2], [[0.1, 0.2]], "increase"),
        ([0, 2], [[0.1, 0.2]], "increase"),
        ([1, 2], [[0.1, float("nan")]], "not finite"),
    ],
)
def test_bad_input_is_refused(d: list, accuracies: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        crossing(torch.tensor(d), torch.tensor(accuracies), 0.9)


# --- the search -----------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 2, 7, 8, 9, 31, 100, 1000])
def test_search_finds_a_step_exactly(at: int) -> None:
    tried, accuracies = search(step(at), 0.9, 1000, tolerance=0)
    assert accuracies.shape == (2, len(tried))
    assert (tried.diff() > 0).all() and tried[0] >= 1 and tried[-1] <= 1000
    assert crossing(tried, accuracies, 0.9).dimension == at
    # Four grid steps up, one beyond, and halvings of the widest bracket of a step of 4 at d=1000.
    assert len(tried) <= 6 + math.ceil(math.log2(750))


def test_search_stops_at_its_tolerance() -> None:
    tried, _ = search(step(5000), 0.9, 100_000, tolerance=0.1)
    high = int(tried[tried >= 5000].min())
    low = int(tried[tried < 5000].max())
    assert high <= 1.1 * low


def test_search_goes_to_the_end_when_nothing_works() -> None:
    tried, accuracies = search(step(10_000), 0.9, 300)
    assert tried.tolist() == [8, 32, 128, 300]
    assert math.isinf(crossing(tried, accuracies, 0.9).dimension)


def test_search_looks_beyond_a_lucky_value() -> None:
    def lucky(d: int) -> list[float]:
        return [1.0 if d == 32 or d >= 2000 else 0.0]

    tried, accuracies = search(lucky, 0.9, 100_000)
    assert 1500 < crossing(tried, accuracies, 0.9).dimension <= 2100


@pytest.mark.parametrize("kwargs", [{"largest": 0}, {"largest": 9, "ratio": 1.0}])
def test_search_refuses_an_empty_range(kwargs: dict) -> None:
    with pytest.raises(InputError, match="correct them"):
        search(step(1), 0.9, **kwargs)


# --- Li et al. 2018, §2: the sum over each of ten groups of 100 parameters is prescribed ----------

TARGET = torch.arange(1.0, 11, dtype=torch.float64)


def toy_performance(kind: str, d: int, seed: int) -> float:
    """exp(−smallest loss) in a random d-dimensional subspace of the 1000 parameters."""
    rng = torch.Generator().manual_seed(1000 * d + seed)
    p = make_projection(kind, 1000, d, rng, dtype=torch.float64)
    columns = [p.expand(e).view(10, 100).sum(1) for e in torch.eye(d, dtype=torch.float64)]
    sums = torch.stack(columns, dim=1)
    z = torch.linalg.pinv(sums) @ TARGET
    return math.exp(-(sums @ z - TARGET).square().sum().item())


@pytest.mark.parametrize("kind", KINDS)
def test_toy_problem_has_intrinsic_dimension_ten(kind: str) -> None:
    def accuracies_of(d: int) -> list[float]:
        return [toy_performance(kind, d, seed) for seed in range(5)]

    tried, accuracies = search(accuracies_of, 0.9, 64)
    found = crossing(tried, accuracies, 0.9)
    assert found.dimension == found.high == 10
    assert found.low >= 9
    assert 8 in tried and 9 in tried
    assert (accuracies[:, tried >= 10] - 1).abs().max() < 1e-9


@pytest.mark.parametrize("d", [7, 8, 9])
def test_toy_problem_below_ten_follows_the_beta_distribution(d: int) -> None:
    # The ten sums of Gaussian columns are isotropic, so the loss left over is |target|² Beta.
    share = stats.beta((10 - d) / 2, d / 2)
    square = TARGET.square().sum().item()
    mean, second = (share.expect(lambda b, k=k: math.exp(-k * square * b)) for k in (1, 2))
    draws = 200
    got = sum(toy_performance("dense", d, seed) for seed in range(draws)) / draws
    assert abs(got - mean) < 4 * math.sqrt((second - mean**2) / draws)
