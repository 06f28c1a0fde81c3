"""Curvatures of samples against second derivatives of each alone, and one way against the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from known_layers import KNOWN, Checkpointed, N, image, losses
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call

from lsa.landscape import Landscape, flatten
from lsa.landscape.derivatives import curvatures, sample_gradients

pytestmark = pytest.mark.usefixtures("double")


def dense(of: Callable[[Tensor], Tensor], theta: Tensor, u: Tensor) -> Tensor:
    """uᵀ∇²ℓᵢu, sample by sample; not by torch.func, which errs for layer norm (in torch 2.14)."""
    alpha = torch.zeros(()).requires_grad_()
    slopes = [grad(loss, alpha, create_graph=True)[0] for loss in of(theta + alpha * u)]
    return torch.stack([grad(slope, alpha, retain_graph=True)[0] for slope in slopes])


@pytest.mark.parametrize("name", KNOWN)
def test_both_ways_give_what_each_sample_alone_has(name):
    model, shape = KNOWN[name]()
    of, theta = losses(model, torch.randn(shape)), flatten(model)
    u = torch.randn(len(theta))
    wanted = dense(of, theta, u)
    assert wanted.abs().min() > 0
    torch.testing.assert_close(curvatures.by_layers(of, theta, u, N), wanted)
    torch.testing.assert_close(curvatures.by_one_step(of, theta, u, N), wanted)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.Softmax(-1), nn.Tanh()])
def test_curvature_between_the_layers_counts(activation):
    inner = nn.Sequential(nn.Linear(4, 6), activation, nn.LayerNorm(6), nn.Linear(6, 5))
    model = nn.Sequential(inner, activation, nn.Linear(5, 3))
    of, theta = losses(model, torch.randn(N, 4)), flatten(model)
    u = torch.randn(len(theta))
    torch.testing.assert_close(curvatures.by_layers(of, theta, u, N), dense(of, theta, u))


def test_what_is_frozen_is_not_moved():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(48, 2))
    x = torch.randn(image())
    for trained in (("0.bias", "3.weight"), ("1.bias",), ("1.weight", "3.bias")):
        parts = {name: dict(model.named_parameters())[name] for name in trained}

        def of(theta: Tensor, parts: dict[str, nn.Parameter] = parts) -> Tensor:
            pieces = theta.split([p.numel() for p in parts.values()])
            named = zip(parts.items(), pieces, strict=True)
            weights = {name: piece.view(p.shape) for (name, p), piece in named}
            return functional_call(model, weights, (x,)).square().sum(1)

        theta = torch.cat([p.detach().flatten() for p in parts.values()])
        u = torch.randn(len(theta))
        assert sample_gradients.are_exact(of, theta)
        torch.testing.assert_close(curvatures.by_layers(of, theta, u, N), dense(of, theta, u))


def test_a_loss_without_curvature_has_none():
    model, x = nn.Linear(4, 3), torch.randn(N, 4)
    theta = flatten(model)

    def of(t: Tensor) -> Tensor:
        weights = {"weight": t[:12].view(3, 4), "bias": t[12:]}
        return functional_call(model, weights, (x,)).sum(1)

    assert curvatures.by_layers(of, theta, torch.randn(15), N).tolist() == [0.0] * N


def test_a_landscape_takes_the_way_that_its_network_has(monkeypatch):
    taken = []
    for name in ("by_layers", "by_one_step"):
        way = getattr(curvatures, name)
        monkeypatch.setattr(
            curvatures, name, lambda *a, way=way, name=name: taken.append(name) or way(*a)
        )
    inner = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    x, y = torch.randn(N, 4), torch.randint(3, (N,))
    u = torch.randn(len(flatten(inner)))
    plain, again = (Landscape(m, x, y, chunk=3) for m in (inner, Checkpointed(inner)))
    torch.testing.assert_close(
        plain.curvatures(flatten(inner), u), again.curvatures(flatten(inner), u)
    )
    assert taken == ["by_layers"] * 2 + ["by_one_step"] * 2


class Normed(nn.Module):
    """Instance norm, of which torch has two derivatives, behind a scale of no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(1, 2, 3).double().view(3, 1, 1))
        self.first, self.norm = nn.Conv2d(1, 3, 3).double(), nn.InstanceNorm2d(3)
        self.last = nn.Linear(3 * 4, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x).tanh() * self.scale)
        return self.last(nn.functional.adaptive_avg_pool2d(h.tanh(), 2).flatten(1))


def test_without_a_third_derivative_samples_have_differences_and_a_remark_that_is_true():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Normed(), torch.randn(6, 1, 6, 6).double()
        landscape = Landscape(model, x, torch.arange(6) % 2)
        u = torch.randn(landscape.dimension).double()
    theta = landscape.theta
    found = landscape.curvatures(theta, u)
    assert found.mean().item() == pytest.approx((u @ landscape.hessian(theta)(u)).item(), rel=1e-6)
    assert "has no third derivative, or no second" in landscape.remarks["curvatures"]
    assert "hessian" not in landscape.remarks  # exact
