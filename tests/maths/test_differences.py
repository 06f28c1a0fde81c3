"""Central differences against exact derivatives in float64: errors, stated errors and cost."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp

from lsa.maths.differences import Differences
from lsa.runtime.errors import InputError


class Net:
    """The loss of a small network as a function of θ, in any precision."""

    def __init__(self, activation: type[nn.Module], seed: int = 0) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.model = nn.Sequential(
            nn.Linear(20, 32), activation(), nn.Linear(32, 32), activation(), nn.Linear(32, 5)
        )
        self.shapes = {n: p.shape for n, p in self.model.named_parameters()}
        self.theta = torch.randn(sum(s.numel() for s in self.shapes.values()), generator=rng) / 4
        self.x = torch.randn(64, 20, generator=rng)
        self.y = torch.randint(5, (64,), generator=rng)

    def loss(self, theta: Tensor) -> Tensor:
        parts = theta.split([s.numel() for s in self.shapes.values()])
        named = {n: p.view(s) for (n, s), p in zip(self.shapes.items(), parts, strict=True)}
        outputs = functional_call(self.model, named, self.x.to(theta))
        return nn.functional.cross_entropy(outputs, self.y)

    def gradient(self, theta: Tensor) -> Tensor:
        return grad(self.loss)(theta)

    def product(self, v: Tensor) -> Tensor:
        """Hv in float64."""
        return jvp(grad(self.loss), (self.theta.double(),), (v.double(),))[1]


def directions(net: Net) -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    random = [torch.randn(len(net.theta), generator=rng) for _ in range(4)]
    steep = [net.gradient(net.theta)]
    for _ in range(5):  # ever closer to the top of the spectrum
        steep.append(net.product(steep[-1] / steep[-1].norm()).float())
    return [*random, *steep]


@pytest.mark.parametrize("activation", [nn.GELU, nn.Tanh, nn.SiLU])
def test_the_stated_error_bounds_the_true_one(activation):
    plain, richardson = [], []
    for seed in range(4):
        net = Net(activation, seed)
        differences = Differences(net.gradient, net.theta, name="Hv")
        for v in directions(net):
            exact = net.product(v)
            for measure, found in (
                (differences.derivative, plain),
                (differences.measured, richardson),
            ):
                value, error = measure(v)
                true = (value.double() - exact).norm().item()
                found.append((true, error, exact.norm().item()))
    for found in (plain, richardson):
        held = [true <= 2 * told for true, told, _ in found]
        assert sum(held) >= 0.95 * len(held)
        loose = sorted(told / true for true, told, _ in found)
        assert loose[len(loose) // 2] < 6, "the stated error says something"
    assert max(true / size for true, _, size in richardson) < 2e-4
    assert max(true / size for true, _, size in plain) < 1e-3


def test_a_product_takes_two_values_once_the_step_is_known():
    net = Net(nn.GELU)
    differences = Differences(net.gradient, net.theta, name="Hv")
    v = directions(net)[-1]
    differences.derivative(v)
    before = differences.evaluations
    for _ in range(3):
        v = differences.derivative(v).value
    assert differences.evaluations == before + 6


def test_each_direction_has_its_own_step():
    """Along one coordinate the function bends a million times as fast as along the other."""

    def function(theta: Tensor) -> Tensor:
        return torch.stack([torch.sin(100 * theta[0]) / 100, torch.sin(theta[1])])

    for i, expected in ((0, 1e-4), (1, 1e-2)):
        differences = Differences(function, torch.tensor([0.3, 0.4]), name="f'")
        v = torch.eye(2)[i]
        value, error = differences.derivative(v)
        true = abs(value[i].item() - math.cos(30.0 if i == 0 else 0.4))
        assert differences._step and expected / 10 < differences._step.size < expected * 10
        assert true < 1e-3 and true < 3 * error + 1e-7


def test_in_float64_an_exact_derivative_is_met_to_ten_digits():
    net = Net(nn.Tanh)
    theta = net.theta.double()
    value, error = Differences(net.gradient, theta, name="Hv").measured(theta)
    exact = net.product(theta)
    assert (value - exact).norm() < 1e-9 * exact.norm()
    assert error < 1e-8 * exact.norm()


def test_the_rounding_is_that_of_low_precision_inside_of_the_function():
    net = Net(nn.GELU)

    def rounded(theta: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.autograd.grad(net.loss(t := theta.requires_grad_()), t)[0]

    differences = Differences(rounded, net.theta, name="Hv")
    for v in directions(net)[4:]:
        value, error = differences.derivative(v)
        exact = net.product(v)
        assert (value.double() - exact).norm() < 0.1 * exact.norm()
        assert (value.double() - exact).norm() < 4 * error


def test_kinks_at_theta_are_refused():
    def kinked(theta: Tensor) -> Tensor:
        return torch.where(theta > 0, theta, -3 * theta)

    differences = Differences(kinked, torch.zeros(50), name="the product")
    with pytest.raises(InputError, match="as they are at kinks"):
        differences.derivative(torch.ones(50) * torch.arange(50))


def test_a_direction_of_no_length_has_no_derivative():
    differences = Differences(lambda theta: theta**2, torch.ones(3), name="f'")
    assert not differences.derivative(torch.zeros(3)).value.any()
    assert differences.measured(torch.zeros(3)).error == 0


def test_one_value_is_held_while_another_is_computed():
    """Of vectors as long as θ: θ, the direction, where the function is asked, and a total."""
    theta = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    v = torch.randn(300_000, generator=torch.Generator().manual_seed(1))
    held: list[int] = []

    def add(total: Tensor | None, at: Tensor, sign: float) -> Tensor:
        found = [o for o in gc.get_objects() if type(o) is Tensor and o.numel() == len(theta)]
        others = {t.data_ptr() for t in found} - {theta.data_ptr(), v.data_ptr()}
        held.append(len(others) + (total is None))
        total = torch.zeros_like(at) if total is None else total
        return total.add_(at.sin(), alpha=sign)

    differences = Differences(torch.sin, theta, name="the derivative", add=add)
    for _ in range(3):
        value, error = differences.derivative(v)
        true = (value.double() - theta.double().cos() * v).norm()
        assert true <= 2 * error and error < 1e-3 * v.norm()
        del value
    assert max(held) <= 2
