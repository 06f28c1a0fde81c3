"""The loss along directions against polynomials whose curvature and asymmetry are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lsa.figures.perturbation import draw
from lsa.landscape import Landscape, flatten
from lsa.probe import Result
from lsa.probes.perturbation import perturbation
from lsa.runtime.errors import InputError

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Polynomial(nn.Module):
    """ℓᵢ(w) = xᵢ (2 w₀² + c w₀³ + r max(w₀, 0) + ½w₁² − ½w₂²)."""

    def __init__(self, cubic: float, kink: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        self.cubic, self.kink = cubic, kink

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, _ = self.w
        value = 2 * a**2 + self.cubic * a**3 + self.kink * a.relu() + b**2 / 2 - c**2 / 2
        return value * x


def polynomial(cubic: float = 0.0, kink: float = 0.0) -> tuple[Landscape, Tensor]:
    model = Polynomial(cubic, kink)
    x = torch.tensor([[0.5], [1.0], [1.5]], dtype=torch.float64)
    return Landscape(model, x, torch.zeros(3), lambda o, y: o.mean()), flatten(model)


def measure(landscape: Landscape, theta: Tensor, **options: Any) -> Result:
    return perturbation(landscape, theta, generator(), lambda *_: None, **options)


def values(result: Result) -> dict[str, float]:
    return {name: metric.value for name, metric in result.metrics.items()}


def test_a_quadratic_has_its_curvatures_and_the_rise_asked_for():
    found = measure(*polynomial(), points=21, rise=0.3)
    v = values(found)
    assert v["rise_at_step"] == pytest.approx(4 * 0.1**2 / 2)  # whatever ε* is
    assert v["lambda_max"] == pytest.approx(4) == pytest.approx(v["curvature_fit"], rel=1e-4)
    assert v["curvature_fit_bottom"] == pytest.approx(-1, rel=1e-4)
    assert v["curvature_finite"] == pytest.approx(4)
    assert v["reach"] == pytest.approx((0.6 / 4) ** 0.5)
    assert v["loss_rise"] == pytest.approx(0.3) and v["asymmetry"] == pytest.approx(0, abs=1e-12)
    # the samples' rises are 0.5, 1 and 1.5 times 0.3 at either end, half the sum of two such means
    error = 0.3 * np.std([0.5, 1, 1.5], ddof=1) / 3**0.5
    assert found.metrics["curvature_finite"].errors["data"] == pytest.approx(error * 4 / 0.3)
    curve = found.curves["loss_along_top"]
    assert curve.error is not None and curve.error[0] == pytest.approx(error)
    assert curve.y == pytest.approx(0.3 * np.linspace(-1, 1, 21) ** 2, abs=1e-9)
    assert found.converged and not found.notes


def test_errors_over_the_data_are_those_of_samples_that_differ_in_scale_alone():
    """ℓᵢ = xᵢ ℓ with x of mean 1: whatever is linear in ℓ has the relative error of x's mean."""
    found = measure(*polynomial(cubic=0.5), points=21, rise=0.3).metrics
    relative = 0.5 / 3**0.5
    for name in (
        "curvature_fit",
        "curvature",
        "lambda_max",
        "lambda_min",
        "loss_rise",
        "rise_at_step",
    ):
        assert found[name].errors["data"] == pytest.approx(relative * abs(found[name].value)), name
    assert found["asymmetry"].value != 0  # a ratio, in which the scale cancels
    assert found["asymmetry"].errors["data"] == pytest.approx(0, abs=1e-12)


def test_a_cubic_part_shows_as_asymmetry_and_not_as_curvature():
    v = values(measure(*polynomial(cubic=0.5)))
    eps = v["reach"]
    assert v["curvature_fit"] == pytest.approx(4, rel=1e-4)
    assert abs(v["asymmetry"]) == pytest.approx(0.5 * eps**3 / (2 * eps**2), rel=1e-3)


def test_a_kink_at_the_checkpoint_is_flagged():
    found = measure(*polynomial(kink=0.1))
    assert not found.converged
    assert "the fitted curvature" in found.notes[0] and "kinks" in found.notes[0]


def test_eigenvectors_that_have_not_converged_are_flagged():
    x = torch.randn(40, 30, generator=generator(1), dtype=torch.float64)
    model = nn.utils.skip_init(nn.Linear, 30, 1, bias=False, dtype=torch.float64)
    landscape = Landscape(model, x, x[:, :1], nn.functional.mse_loss)
    found = measure(landscape, torch.zeros(30, dtype=torch.float64), max_products=3)
    assert not found.converged and any("not converged in 3" in note for note in found.notes)
    assert not any("kinks" in note for note in found.notes)  # the loss is a parabola


@pytest.fixture(scope="module")
def relu_net() -> tuple[Landscape, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3))
    x = torch.randn(400, 6, generator=generator(1))
    return Landscape(model, x, (2 * x[:, 0]).long().clamp(-1, 1) + 1), flatten(model)


def test_between_kinks_a_relu_network_has_the_curvature_of_its_hessian_in_float32(relu_net):
    found = measure(*relu_net, tol=1e-3)
    v = values(found)
    assert v["curvature_fit"] == pytest.approx(v["lambda_max"], rel=1e-3)
    assert v["slope_fit"] == pytest.approx(v["slope"], abs=1e-5)
    assert found.converged


class RMSNorm(nn.Module):
    """As Hugging Face's: whatever its inputs are, their size is computed in `inside`."""

    def __init__(self, inside: torch.dtype) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        z = x.to(self.inside)
        return (z * torch.rsqrt(z.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Linear(nn.Linear):
    """Its weights are rounded, too: a narrow step moves nothing at all."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.float(), self.weight.float(), self.bias.float()).to(x.dtype)


def normed(linear: type[nn.Linear], inside: torch.dtype) -> tuple[Landscape, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(linear(6, 8), nn.Tanh(), RMSNorm(inside), linear(8, 3)).double()
    x = torch.randn(20, 6, generator=generator(1), dtype=torch.float64)
    return Landscape(model, x, torch.arange(20) % 3), flatten(model)


@pytest.mark.parametrize("linear", [nn.Linear, Linear])
def test_a_network_that_computes_in_float32_inside_has_the_curvatures_of_its_twin(linear):
    found = measure(*normed(linear, torch.float32))
    v, twin = values(found), values(measure(*normed(nn.Linear, torch.float64)))
    assert found.converged and not found.notes
    for name in ("curvature_fit", "curvature_fit_bottom", "curvature_fit_random"):
        exact = twin[name.replace("_fit", "")]
        assert v[name] == pytest.approx(exact, rel=1e-2), name
    assert twin["curvature_fit"] == pytest.approx(twin["lambda_max"], rel=1e-4)


def test_losses_are_those_of_the_shifted_parameters(relu_net):
    landscape, theta = relu_net
    before = [p.clone() for p in landscape.model.parameters()]
    found = measure(landscape, theta, points=5)
    eps, losses = found.arrays["eps_list"], found.arrays["losses"]
    assert losses.shape == (3, 5) and eps[2] == 0
    assert losses[:, 2] == pytest.approx(landscape.loss(theta))
    again = measure(landscape, theta, points=5)
    assert (again.arrays["losses"] == losses).all()
    for parameter, old in zip(landscape.model.parameters(), before, strict=True):
        assert parameter.dtype == torch.float32 and torch.equal(parameter, old)
    assert len(draw(found, "title").axes) == 2


def test_refusals():
    landscape, theta = polynomial()
    upside_down = Landscape(landscape.model, -landscape.x, landscape.y, lambda o, y: o.mean())
    flat = Landscape(landscape.model, 0 * landscape.x, landscape.y, lambda o, y: o.mean())
    assert values(measure(upside_down, theta))["lambda_max"] == pytest.approx(1)
    with pytest.raises(InputError, match="is not positive"):
        measure(flat, theta)
