"""Double backward against the dense Hessian."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lsa.landscape import Landscape, flatten
from lsa.landscape.derivatives.modes import double_backward


def network(activation: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), activation(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(8, 3),
    ).double()  # fmt: skip


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 1, 6, 6, generator=generator).double(), torch.arange(6) % 3


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.GELU])
def test_a_product_is_that_with_the_dense_hessian(activation):
    model, (x, y) = network(activation), batch()
    at = Landscape(model, x, y)
    theta = flatten(model)

    def loss(t: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, at.unflatten(t), (x,)), y)

    H = torch.autograd.functional.hessian(loss, theta)
    product = double_backward(loss, theta)
    for seed in range(2):
        v = torch.randn(len(theta), generator=torch.Generator().manual_seed(seed)).double()
        torch.testing.assert_close(product(v), H @ v, rtol=1e-9, atol=1e-12)


def test_a_loss_that_is_linear_has_no_curvature():
    theta = torch.ones(3)
    assert torch.equal(double_backward(torch.sum, theta)(theta), torch.zeros(3))
