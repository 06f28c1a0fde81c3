"""Sharpness against quadratics, whose every case is known, and rescaled networks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from quadratics import highest
from torch import Tensor, nn

from lsa.figures.sharpness import draw
from lsa.landscape import Landscape, flatten
from lsa.probe import Result
from lsa.probes.sharpness import sharpness
from lsa.runtime.errors import InputError

pytestmark = pytest.mark.usefixtures("global_rng_untouched")
D = 12


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def measure(landscape: Landscape, theta: Tensor, **options: Any) -> Result:
    return sharpness(
        landscape, theta, generator(), lambda *_: None, **({"probes": 2, "starts": 2} | options)
    )


def values(result: Result) -> dict[str, float]:
    return {name: metric.value for name, metric in result.metrics.items()}


def half_square(outputs: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (outputs - y).square().mean()


def regression(x: Tensor, y: Tensor) -> Landscape:
    """L(w) = ½ mean (xᵢ·w − yᵢ)²: H = mean xᵢxᵢᵀ."""
    model = nn.utils.skip_init(nn.Linear, x.shape[1], 1, bias=False, dtype=torch.float64)
    return Landscape(model, x, y, half_square)


def quadratic(n: int = 40, seed: int = 1) -> tuple[Landscape, Tensor, Tensor, Tensor]:
    """A regression, weights away from its minimum with one of them 0, and g and H there."""
    x = normal(n, D, seed=seed) * torch.logspace(0.5, -0.5, D, dtype=torch.float64)
    landscape = regression(x, normal(n, 1, seed=seed + 100))
    theta = normal(D, seed=3)
    theta[4] = 0.0
    return landscape, theta, landscape.gradient(theta), x.T @ x / n


def test_away_from_the_minimum_every_case_is_the_closed_form():
    landscape, theta, g, H = quadratic()
    options = {"rho": 0.3, "adaptive_rho": 0.7, "sigma": 0.05, "adaptive_sigma": 0.2}
    result = measure(landscape, theta, tol=1e-6, probes=150, **options)
    found = values(result)
    scales = {"": torch.ones(D, dtype=torch.float64), "adaptive_": theta.abs()}
    for prefix, t in scales.items():
        rho, sigma = options[f"{prefix}rho"], options[f"{prefix}sigma"]
        slope, curved = t * g, t[:, None] * H * t
        u = slope / slope.norm()
        step = rho * slope.norm() + rho**2 / 2 * u @ curved @ u
        assert found[f"{prefix}sam_rise"] == pytest.approx(step.item())
        worst = highest(curved, slope, rho)
        assert found[f"{prefix}worst_case"] == pytest.approx(worst, rel=1e-4)
        average = result.metrics[f"{prefix}average_case"]
        error = average.errors["probes"]
        assert average.value == pytest.approx(sigma**2 / 2 * curved.trace().item(), abs=4 * error)
        assert error == pytest.approx(sigma**2 * curved.norm().item() / (2 * 150) ** 0.5, rel=0.25)
    assert result.converged and not result.notes
    assert len(draw(result, "title").axes) == 2


def test_at_a_minimum_the_worst_case_is_half_the_top_eigenvalue_times_the_squared_radius():
    landscape, _, _, H = quadratic()
    theta = torch.linalg.lstsq(landscape.x, landscape.y).solution[:, 0]
    T = theta.abs()
    found = values(measure(landscape, theta, rho=0.1, adaptive_rho=0.3))
    assert found["worst_case"] == pytest.approx(
        0.1**2 / 2 * torch.linalg.eigvalsh(H)[-1].item(), rel=1e-2
    )
    adaptive = torch.linalg.eigvalsh(T[:, None] * H * T)[-1].item()
    assert found["adaptive_worst_case"] == pytest.approx(0.3**2 / 2 * adaptive, rel=1e-2)


def relu_net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3)).double()


def classification(model: nn.Module, n: int = 60) -> Landscape:
    return Landscape(model, normal(n, 5), torch.randint(0, 3, (n,), generator=generator(2)))


def test_scaling_one_layer_and_the_next_by_its_inverse_moves_the_plain_cases_alone():
    plain = relu_net()
    scaled = relu_net()
    with torch.no_grad():
        for parameter, c in zip(scaled.parameters(), (7, 7, 1 / 7, 1), strict=True):
            parameter.mul_(c)
    x = normal(60, 5)
    assert plain(x).detach().numpy() == pytest.approx(scaled(x).detach().numpy())
    one, two = (values(measure(classification(m), flatten(m), m=20)) for m in (plain, scaled))
    for name in ("sam_rise", "worst_case", "average_case", "m_sharpness"):
        assert two[f"adaptive_{name}"] == pytest.approx(one[f"adaptive_{name}"], rel=1e-6)
        assert two[name] > 2 * one[name]


@pytest.mark.parametrize("seed", range(4))
def test_the_worst_case_is_never_below_the_step_nor_zero(seed):
    model = relu_net(seed)
    for options in ({}, {"rho": 5.0, "adaptive_rho": 5.0}, {"max_gradients": 1, "starts": 1}):
        found = values(measure(classification(model), flatten(model), **options))
        for prefix in ("", "adaptive_"):
            assert found[f"{prefix}worst_case"] >= max(0.0, found[f"{prefix}sam_rise"])


def test_at_the_top_of_a_hill_nothing_rises():
    landscape = quadratic()[0]
    model, x, y = landscape.model, landscape.x, landscape.y
    hill = Landscape(model, x, y, lambda o, t: -half_square(o, t))
    top = torch.linalg.lstsq(x, y).solution[:, 0]
    found = measure(hill, top, max_gradients=2)
    assert values(found)["worst_case"] == 0 and values(found)["average_case"] < 0


def test_a_weight_of_zero_is_not_perturbed_adaptively():
    x = torch.zeros(10, D, dtype=torch.float64)
    x[:, 4] = normal(10)
    landscape, (_, theta, _, _) = regression(x, normal(10, 1)), quadratic()
    found = measure(landscape, theta)
    assert theta[4] == 0 and values(found)["worst_case"] > 0
    assert values(found)["adaptive_worst_case"] == values(found)["adaptive_average_case"] == 0
    assert "adaptive_sam_rise" not in found.metrics
    assert found.notes == ("adaptive_sam_rise: the gradient is 0, so SAM's step has no direction",)
    assert len(draw(found, "title").axes) == 2


def test_on_single_samples_m_sharpness_is_the_mean_of_their_closed_forms():
    """½(r + x·ε)² is largest at ½(|r| + ρ|x|)²."""
    landscape, theta, _, _ = quadratic()
    found = measure(landscape, theta, m=1, rho=0.3, tol=1e-6)
    r = (landscape.x @ theta - landscape.y[:, 0]).abs()
    rises = ((r + 0.3 * landscape.x.norm(dim=1)) ** 2 - r**2) / 2
    metric = found.metrics["m_sharpness"]
    assert metric.value == pytest.approx(rises.mean().item(), rel=1e-4)
    assert metric.errors["data"] == pytest.approx(rises.std().item() / 40**0.5, rel=1e-3)


def test_m_sharpness_grows_as_batches_shrink_from_the_worst_case_of_all():
    landscape, theta, _, _ = quadratic()
    runs = {m: measure(landscape, theta, m=m, tol=1e-6) for m in (40, 20, 5)}
    rising = [values(run)["m_sharpness"] for run in runs.values()]
    assert rising[0] == pytest.approx(values(runs[40])["worst_case"], rel=1e-4)
    assert rising == sorted(rising) and rising[2] > 1.05 * rising[0]
    assert not runs[40].metrics["m_sharpness"].errors  # one batch has no spread
    assert any("leaves out 1 samples" in note for note in measure(landscape, theta, m=3).notes)
    assert len(draw(runs[5], "title").axes) == 2


def test_errors_over_the_data_are_the_spread_over_draws_of_the_data():
    theta, truth = normal(4, seed=3), normal(4, 1, seed=4)
    runs = []
    for seed in range(50):
        x = normal(150, 4, seed=1000 + seed)
        y = x @ truth + normal(150, 1, seed=2000 + seed)
        runs.append(measure(regression(x, y), theta, rho=0.5, adaptive_rho=0.5).metrics)
    for name in ("sam_rise", "worst_case", "average_case"):
        for prefix in ("", "adaptive_"):
            spread = np.std([run[prefix + name].value for run in runs], ddof=1)
            reported = np.mean([run[prefix + name].errors["data"] for run in runs])
            # a deviation from 50 draws is good to 10 %
            assert reported == pytest.approx(spread, rel=0.35), prefix + name


class TwoHills(nn.Module):
    """ℓᵢ = 9w₀² + 10w₁² + 8w₀³: up to |w| = 1 highest at w₀ = 1, though steepest along w₁ at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w
        return 9 * a**2 + 10 * b**2 + 8 * a**3 + 0.1 * b + 0 * x


def two_hills() -> tuple[Landscape, Tensor]:
    model, x = TwoHills(), torch.zeros(3, 1, dtype=torch.float64)
    return Landscape(model, x, torch.zeros(3), lambda o, y: o.mean()), flatten(model)


def test_several_starts_find_the_highest_of_several_hills():
    landscape, theta = two_hills()
    one = measure(landscape, theta, rho=1.0, starts=1)
    assert values(one)["worst_case"] == pytest.approx(10.1, rel=1e-3)  # where SAM's step leads
    many = measure(landscape, theta, rho=1.0, starts=12)
    assert values(many)["worst_case"] == pytest.approx(17, rel=1e-3)
    assert 2 / 12 <= values(many)["ascent_agreement"] <= 8 / 12


def test_a_height_that_one_start_alone_reached_is_noted():
    landscape, theta = two_hills()
    runs = [
        sharpness(landscape, theta, generator(s), lambda *_: None, rho=1.0, starts=2)
        for s in range(8)
    ]
    lonely = [any("only one of 2 ascents" in note for note in run.notes) for run in runs]
    assert lonely == [values(run)["ascent_agreement"] == 0.5 for run in runs] and any(lonely)


def test_a_search_that_was_cut_short_is_flagged():
    landscape, theta, _, _ = quadratic()
    found = measure(landscape, theta, max_gradients=1, m=20, rho=5.0)
    assert not found.converged
    assert [note.split(":")[0] for note in found.notes] == [
        "worst_case",
        "adaptive_worst_case",
        "m-sharpness",
    ]


def test_a_batch_of_more_samples_than_there_are_is_refused():
    landscape, theta, _, _ = quadratic()
    with pytest.raises(InputError, match="m=41: choose a batch of 1 to 40"):
        measure(landscape, theta, m=41)


class Roof(nn.Module):
    """b − 9 |a|: steep on both sides of a = 0, where alone it rises."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.01], dtype=torch.float64))
        self.b = nn.Parameter(torch.zeros(20, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.b.sum() - 9 * self.a.abs()).expand(len(x), 1)


def test_the_worst_case_on_a_kink_is_found_and_said_to_lie_there():
    x = normal(4, 3)
    landscape = Landscape(Roof(), x, x, lambda outputs, _: outputs.mean())
    result = measure(landscape, flatten(landscape.model), rho=0.05)
    exact = 20**0.5 * (0.05**2 - 0.01**2) ** 0.5 + 9 * 0.01
    assert exact * 0.99 < values(result)["worst_case"] <= exact * (1 + 1e-9)
    assert values(result)["ascent_gap"] > 0.1 and result.converged
    assert any("settled at a kink" in note for note in result.notes)
