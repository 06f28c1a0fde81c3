"""A recorded function gives what it gives unrecorded."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lsa.landscape import Landscape, flatten
from lsa.landscape.derivatives.replay import EAGER, replayed
from lsa.training import models

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


def test_off_a_gpu_nothing_is_recorded():
    def function(x):
        return x

    assert replayed(function, torch.device("cpu")) is function


@GPU
def test_every_call_sees_its_own_arguments_and_keeps_its_result():
    function = replayed(lambda x, y: (x * y, x + y), torch.device("cuda"))
    pairs = [torch.randn(2, 1000, device="cuda") for _ in range(EAGER + 4)]
    found = [function(*pair) for pair in pairs]
    for (x, y), (product, total) in zip(pairs, found, strict=True):
        assert torch.equal(product, x * y) and torch.equal(total, x + y)
    assert torch.equal(function(pairs[0][0][:7], pairs[0][1][:7])[1], pairs[0].sum(0)[:7])


@GPU
@pytest.mark.parametrize("memory", [0, None])
@pytest.mark.parametrize("name", ["hessian", "gauss_newton", "covariance"])
def test_products_are_those_of_the_cpu_before_and_after_the_recording(name, memory):
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 3, 8, 8, generator=rng), torch.randint(10, (40,), generator=rng)
    model = models.build("simple_cnn", input_shape=(3, 8, 8), classes=10, seed=0, width=4).double()
    theta = flatten(model)
    host = Landscape(model, x.double(), y)
    card = Landscape(model, x.double().cuda(), y.cuda(), chunk=16, memory=memory)
    wanted, found = getattr(host, name)(theta), getattr(card, name)(theta.cuda())
    for _ in range(EAGER + 3):
        v = torch.randn(len(theta), generator=rng, dtype=torch.float64)
        torch.testing.assert_close(found(v.cuda()).cpu(), wanted(v), rtol=1e-9, atol=1e-11)


@GPU
def test_a_loss_that_asks_the_gpu_for_a_number_runs_as_it_is():
    def loss(outputs, targets):
        whole = F.cross_entropy(outputs, targets)
        return whole * (2.0 if outputs.detach().sum().item() > -1e30 else 1.0)

    x, y = torch.randn(20, 5, device="cuda"), torch.randint(3, (20,), device="cuda")
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    at = Landscape(model, x, y, loss, memory=0)
    plain = Landscape(model, x, y, memory=0)
    theta = flatten(at.model)
    twice, once = at.hessian(theta), plain.hessian(theta)
    for _ in range(EAGER + 3):
        v = torch.randn_like(theta)
        torch.testing.assert_close(twice(v), 2 * once(v))


@GPU
def test_gradients_on_mini_batches_follow_theta_and_batch():
    x, y = torch.randn(64, 1, 8, 8, device="cuda"), torch.randint(10, (64,), device="cuda")
    model = models.build("simple_cnn", input_shape=(1, 8, 8), classes=10, seed=0, width=4)
    at = Landscape(model, x, y)
    gradient_on, theta = at.batch_gradient(), flatten(at.model)
    for i in range(EAGER + 4):
        chosen = torch.arange(i, i + 32, device="cuda")
        loss, gradient = gradient_on(theta + 0.01 * i, x[chosen], y[chosen])
        value, wanted = at.subset(chosen).loss_and_gradient(theta + 0.01 * i)
        torch.testing.assert_close(loss.item(), value)
        torch.testing.assert_close(gradient, wanted)
