"""The audit against dense Hessians: what scales, by what factor, and what does not."""

from __future__ import annotations

from typing import Any

import pytest
import small_transformers
import torch
from tiny import seeded
from torch import Tensor, nn

from lsa.figures.symmetry_audit import draw
from lsa.landscape import Landscape, flatten
from lsa.probe import Result, find
from lsa.runtime.errors import InputError
from lsa.training import models

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

CHANGES = ("rescaled_layers", "rescaled_units", "permuted")
EVERYTHING = {
    "lambda_max", "trace", "gradient_norm", "weight_norm", "adaptive_lambda_max",
    "filter_curvature", "preconditioned_lambda_max", "sam_rise", "adaptive_sam_rise",
}  # fmt: skip


class Product(nn.Module):
    """f(x) = v u x, with the weights u and v of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.skip_init(nn.Linear, 1, 2, bias=False, dtype=torch.float64)
        self.last = nn.utils.skip_init(nn.Linear, 2, 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([[1.5], [0.0]]))
            self.last.weight.copy_(torch.tensor([[0.8, 0.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


def squared(outputs: Tensor, y: Tensor) -> Tensor:
    return (outputs - y).square().mean() / 2


def network(steps: int = 50, **options: Any) -> tuple[Landscape, Tensor]:
    """A small classifier after some steps of training, in float64."""
    rng = torch.Generator().manual_seed(0)
    model = models.build("mlp", input_shape=(6,), classes=3, seed=0, **options).double()
    x = torch.randn(30, 6, generator=rng, dtype=torch.float64)
    landscape = Landscape(model, x, torch.randint(3, (30,), generator=rng))
    theta = flatten(model)
    for _ in range(steps):
        theta = theta - 0.3 * landscape.gradient(theta)
    return landscape, theta


def scales(factor: float) -> Tensor:
    """a in θ' = diag(a) θ of `network(hidden=[7])` with its layers rescaled."""
    parts = ((6 * 7, factor), (7, factor), (7 * 3, 1 / factor), (3, 1.0))
    return torch.cat([torch.full((n,), a, dtype=torch.float64) for n, a in parts])


def top(matrix: Tensor) -> float:
    return float(torch.linalg.eigvalsh(matrix)[-1])


def measure(landscape: Landscape, theta: Tensor, **options: Any) -> Result:
    return find("symmetry_audit")(
        landscape=landscape, theta=theta, **{"probes": 3, "tol": 1e-8, **options}
    )


def values(result: Result) -> dict[str, float]:
    return {name: metric.value for name, metric in result.metrics.items()}


def test_two_linear_layers_have_their_closed_form():
    """L = E x² (vu − c)²/2: H = E x² [[v², 2uv − c], [2uv − c, u²]], ∇L = E x² (uv − c) (v, u).

    Scaled by a they are those of (au, v/a). The second unit is dead, and adds E x² (uv − c) off
    the diagonal between its own two weights.
    """
    model = Product()
    x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    c, mean = 0.7, 2.5  # of x²
    found = measure(Landscape(model, x, c * x, squared), flatten(model), factor=4.0, probes=100)

    def closed(u: float, v: float) -> dict[str, float]:
        off, residual = 2 * u * v - c, u * v - c
        H = mean * torch.tensor([[v * v, off], [off, u * u]], dtype=torch.float64)
        norm = (u * u + v * v) ** 0.5
        return {
            "lambda_max": max(top(H), mean * abs(residual)),
            "trace": mean * norm**2,
            "gradient_norm": mean * abs(residual) * norm,
            "weight_norm": norm,
        }

    before, after = closed(1.5, 0.8), closed(6.0, 0.2)
    for name, one in before.items():
        for key, expected in (name, one), (f"{name}_rescaled_layers", after[name] / one):
            metric = found.metrics[key]
            error = metric.errors.get("probes", 0.0)
            assert metric.value == pytest.approx(expected, abs=3 * error, rel=1e-6), key


def test_permutations_move_nothing_and_rescalings_what_they_must():
    found = measure(*network(hidden=[7, 5]), probes=3)
    v = values(found)
    assert set(v) >= {f"{name}_{change}" for name in EVERYTHING for change in CHANGES}
    for change in CHANGES:
        assert v[f"function_change_{change}"] < 1e-13
    for name in EVERYTHING:
        assert v[f"{name}_permuted"] == pytest.approx(1, abs=1e-7), name
    for change in ("rescaled_layers", "rescaled_units"):
        for name in ("adaptive_lambda_max", "adaptive_sam_rise"):
            assert v[f"{name}_{change}"] == pytest.approx(1, abs=1e-7), name
        for name in ("lambda_max", "trace", "gradient_norm", "weight_norm", "sam_rise"):
            assert v[f"{name}_{change}"] != pytest.approx(1, abs=0.01), name
    # a filter keeps its direction when its layer is scaled, but not when its inputs are, each by
    # another factor
    assert v["filter_curvature_rescaled_layers"] == pytest.approx(1, abs=1e-9)
    assert v["filter_curvature_rescaled_units"] != pytest.approx(1, abs=0.01)
    assert found.converged
    assert any("nothing moves" in n and n.startswith("permuted") for n in found.notes)


def test_the_numbers_are_those_of_dense_matrices():
    """H' = A⁻¹HA⁻¹ and g' = A⁻¹g for θ' = Aθ, with A = diag(a) read off the scaled layers."""
    landscape, theta = network(hidden=[7])
    v = values(measure(landscape, theta, factor=3.0))
    eye = torch.eye(len(theta), dtype=torch.float64)
    H, g = landscape.hessian(theta)(eye), landscape.gradient(theta)
    A = scales(3.0)
    moved = H / A / A[:, None]
    gradients = torch.cat(list(landscape.sample_gradients(theta)))
    P = gradients.square().mean(0).sqrt()

    def felt(matrix: Tensor, P: Tensor) -> float:
        s = (P + 1e-8).rsqrt()
        return top(s[:, None] * matrix * s)

    assert v["lambda_max"] == pytest.approx(top(H))
    assert v["lambda_max_rescaled_layers"] == pytest.approx(top(moved) / top(H))
    adaptive = theta.abs()[:, None] * H * theta.abs()
    assert v["adaptive_lambda_max"] == pytest.approx(top(adaptive))
    assert v["preconditioned_lambda_max"] == pytest.approx(felt(H, P))
    ratio = felt(moved, P / A) / felt(H, P)
    assert v["preconditioned_lambda_max_rescaled_layers"] == pytest.approx(ratio)
    ratio = float((g / A).norm() / g.norm())
    assert v["gradient_norm_rescaled_layers"] == pytest.approx(ratio)
    base = landscape.loss(theta)
    assert v["sam_rise"] == pytest.approx(landscape.loss(theta + 0.05 * g / g.norm()) - base)
    tilted = theta.abs() * g
    step = 0.5 * theta.abs() * tilted / tilted.norm()
    assert v["adaptive_sam_rise"] == pytest.approx(landscape.loss(theta + step) - base)


def test_the_error_of_a_factor_is_that_of_the_bootstrap():
    """Dense, of resampled data; before training and of one class, so the gradient is far from 0.

    At 0 the norm of a gradient is no smooth function of the data, and has no first-order error.
    """
    landscape, theta = network(steps=0, hidden=[7])
    landscape = landscape.with_data(landscape.x, torch.zeros_like(landscape.y))
    found = measure(landscape, theta, factor=3.0).metrics
    eye = torch.eye(len(theta), dtype=torch.float64)
    hessians = torch.stack(
        [landscape.subset(torch.tensor([i])).hessian(theta)(eye) for i in range(30)]
    )
    gradients = torch.cat(list(landscape.sample_gradients(theta)))
    A, rng = scales(3.0), torch.Generator().manual_seed(5)
    ratios: dict[str, list[float]] = {"lambda_max": [], "gradient_norm": []}
    for _ in range(300):
        drawn = torch.randint(30, (30,), generator=rng)
        H, g = hessians[drawn].mean(0), gradients[drawn].mean(0)
        ratios["lambda_max"].append(top(H / A / A[:, None]) / top(H))
        ratios["gradient_norm"].append(float((g / A).norm() / g.norm()))
    for name, values in ratios.items():
        spread = float(torch.tensor(values).std())
        error = found[f"{name}_rescaled_layers"].errors["data"]
        assert error == pytest.approx(spread, rel=0.25), name


def test_smooth_activations_have_units_to_renumber_but_none_to_scale():
    found = measure(*network(hidden=[7], activation="tanh"))
    assert "lambda_max_permuted" in found.metrics
    assert "lambda_max_rescaled_layers" not in found.metrics
    assert any(note.startswith("no layer can be rescaled") for note in found.notes)
    draw(found, "tanh").canvas.draw()


def test_a_network_without_hidden_layers_has_no_symmetry():
    found = measure(*network(hidden=[]))
    assert not any(name.endswith(CHANGES) for name in found.metrics)
    assert any("there is no hidden layer" in note for note in found.notes)
    draw(found, "none").canvas.draw()


class Summed(nn.Module):
    """Units that depend on their order."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)).cumsum(-1))


def test_a_network_whose_units_are_not_known_says_so():
    model = seeded(Summed)
    x = torch.linspace(-1, 1, 40, dtype=torch.float64).view(10, 4)
    found = measure(Landscape(model, x, torch.arange(10) % 3), flatten(model))
    assert any(note.startswith("no symmetry of this network is known") for note in found.notes)
    assert found.metrics["lambda_max"].value > 0


class Float32ReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float().relu().to(x.dtype)


def test_units_whose_activation_is_computed_in_float32_can_be_rescaled():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6), Float32ReLU(), nn.Linear(6, 3)))
    x = torch.linspace(-1, 1, 40, dtype=torch.float64).view(10, 4)
    found = measure(Landscape(model, x, torch.arange(10) % 3), flatten(model))
    assert "parts that can be rescaled: units of 0.weight" in found.notes
    assert found.metrics["lambda_max_permuted"].value == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", [pytest.param("own head", marks=pytest.mark.full), "rotary"])
def test_a_transformer_is_changed_along_its_own_symmetries(name):
    at = small_transformers.landscape(small_transformers.made(name))
    found = measure(at, at.theta, probes=2, tol=1e-4, adaptive_rho=0.05)
    numbers = values(found)
    changes = ("rescaled_layers", "rescaled_units", "permuted", "rotated")
    assert all(numbers[f"function_change_{change}"] < 1e-10 for change in changes)
    for number in ("lambda_max", "trace", "gradient_norm", "weight_norm", "sam_rise"):
        for change in ("permuted", "rotated"):
            assert numbers[f"{number}_{change}"] == pytest.approx(1, abs=1e-5), (number, change)
        for change in ("rescaled_layers", "rescaled_units"):
            assert abs(numbers[f"{number}_{change}"] - 1) > 0.01, (number, change)
    for number in ("adaptive_lambda_max", "preconditioned_lambda_max"):
        assert numbers[f"{number}_permuted"] == pytest.approx(1, abs=1e-5)
        assert abs(numbers[f"{number}_rotated"] - 1) > 1e-3
    # What is relative to each weight does not see one factor of a whole layer.
    assert numbers["adaptive_lambda_max_rescaled_layers"] == pytest.approx(1, abs=1e-4)
    draw(found, name).canvas.draw()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": float("inf")}, "factor=inf must be a finite number"),
    ],
)
def test_bad_input_is_told_in_one_line(options, message):
    with pytest.raises(InputError, match=message) as caught:
        measure(*network(hidden=[7]), **options)
    assert "\n" not in str(caught.value)
