"""Every mode against the dense Hessian."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lsa.landscape import Landscape, flatten
from lsa.landscape.derivatives import modes, products
from lsa.runtime.errors import InputError


def network(activation: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), activation(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(8, 3),
    ).double()  # fmt: skip


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 1, 6, 6, generator=generator).double(), torch.arange(6) % 3


@pytest.mark.parametrize("mode", modes.MODES)
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.GELU])
def test_a_product_is_that_with_the_dense_hessian(mode, activation):
    model, (x, y) = network(activation), batch()
    at = Landscape(model, x, y)
    theta = flatten(model)

    def loss(t: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, at.unflatten(t), (x,)), y)

    H = torch.autograd.functional.hessian(loss, theta)
    product = modes.MODES[mode](loss, theta)
    for seed in range(2):
        v = torch.randn(len(theta), generator=torch.Generator().manual_seed(seed)).double()
        torch.testing.assert_close(product(v), H @ v, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", modes.MODES)
def test_a_loss_that_is_linear_has_no_curvature(mode):
    theta = torch.ones(3)
    assert torch.equal(modes.MODES[mode](torch.sum, theta)(theta), torch.zeros(3))


def test_what_a_mode_lacks_is_said_in_one_line():
    """PyTorch 2.14 has no forward derivative of the gradient of a squared error."""
    x, y = torch.randn(4, 3), torch.randn(4, 3)

    def loss(t: Tensor) -> Tensor:
        return F.mse_loss(torch.tanh(x * t), y)

    theta = torch.ones(3)
    with pytest.raises(InputError) as raised:
        modes.forward_over_reverse(loss, theta)(theta)
    text = str(raised.value)
    assert text.startswith("forward_over_reverse is not possible for this network: ")
    assert "\n" not in text
    expected = torch.autograd.functional.hessian(loss, theta) @ theta
    for mode in (modes.double_backward, modes.reverse_over_forward):
        torch.testing.assert_close(mode(loss, theta)(theta), expected)


def test_memory_that_does_not_suffice_stays_what_it_is():
    def loss(t: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("none left")

    with pytest.raises(torch.OutOfMemoryError):
        modes.reverse_over_forward(loss, torch.ones(3))(torch.ones(3))


@pytest.mark.parametrize(("memory", "expected"), [(0, 4), (1 << 30, 0)])
def test_what_is_kept_is_by_double_backward(monkeypatch, memory, expected):
    asked = []

    def noted(loss, theta):
        asked.append(loss)
        return modes.reverse_over_forward(loss, theta)

    monkeypatch.setitem(products.MODES, "reverse_over_forward", noted)
    model, (x, y) = network(nn.Tanh), batch()
    make = partial(Landscape, model, x, y, chunk=3, memory=memory)
    theta = flatten(model)
    product = make(mode="reverse_over_forward").hessian(theta)
    block = torch.stack([theta, theta.flip(0)], 1)
    found = [product(block) for _ in range(2)]
    assert len(asked) == expected  # two chunks, twice
    for one in found:
        torch.testing.assert_close(one, make().hessian(theta)(block), rtol=1e-9, atol=1e-12)
