"""The gradient's length, angle and shares against dense autograd and jackknives in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import images, seeded
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import lsa
from lsa.landscape import Landscape, flatten
from lsa.probe import Result
from lsa.probes.gradient import gradient
from lsa.training import optimizers, stability

pytestmark = pytest.mark.usefixtures("global_rng_untouched")
N = 200
SIZES = [24, 15]  # parameters of the two layers


@pytest.fixture(scope="module")
def net() -> tuple[Landscape, Tensor]:
    rng = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(N, 5, generator=rng, dtype=torch.float64)
    y = torch.randint(0, 3, (N,), generator=rng)
    return Landscape(model, x, y, chunk=64), flatten(model)


@pytest.fixture(scope="module")
def samples(net) -> Tensor:
    """∇ℓᵢ of every sample by torch alone, `(N, d)`."""
    landscape, _ = net
    parameters = {name: p.detach() for name, p in landscape.model.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(landscape.model, values, (x[None],)), y[None])

    each = vmap(grad(loss), (None, 0, 0))(parameters, landscape.x, landscape.y)
    return torch.cat([part.reshape(N, -1) for part in each.values()], 1)


def jackknife(f: Any, rows: Tensor) -> Any:
    """Standard error of f(mean of the rows), by leaving each out."""
    left_out = (rows.sum(0) - rows) / (N - 1)
    return np.std([f(mean) for mean in left_out], axis=0) * (N - 1) ** 0.5


def degrees(a: Tensor, b: Tensor) -> float:
    return math.degrees(torch.acos(a @ b / (a.norm() * b.norm())).item())


def shares(g: Tensor) -> list[float]:
    return [(part.square().sum() / g.square().sum()).item() for part in g.split(SIZES)]


def stepped(landscape: Landscape, theta: Tensor, name: str, **options: Any) -> Any:
    """An optimizer of torch after two steps on other gradients; its state at θ."""
    p = nn.Parameter(theta.clone())
    optimizer = getattr(torch.optim, name)([p], **options)
    for seed in range(2):
        p.grad = torch.randn(len(theta), generator=torch.Generator().manual_seed(seed)).to(theta)
        optimizer.step()
    return stability.read(optimizer, [p], 20)


def test_length_and_shares_are_those_of_dense_autograd_and_errors_the_jackknifes(net, samples):
    landscape, theta = net
    g, found = samples.mean(0), gradient(landscape, theta)
    norm, curve = found["gradient_norm"], found.curves["share_of_layer"]
    assert norm.value == pytest.approx(g.norm().item(), rel=1e-12)
    assert norm.errors["data"] == pytest.approx(jackknife(torch.norm, samples), rel=0.02)
    np.testing.assert_allclose(curve.y, shares(g), rtol=1e-12)
    assert curve.error is not None and sum(curve.y) == pytest.approx(1)
    np.testing.assert_allclose(curve.error, jackknife(shares, samples), rtol=0.05)
    assert found.arrays["layers.sizes"].tolist() == SIZES
    assert any("no update_angle" in note for note in found.notes)


@pytest.mark.parametrize(
    ("name", "options"),
    [("AdamW", {"lr": 1e-2}), ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1})],
)
def test_the_angle_is_that_of_the_step_that_torch_makes(net, samples, name, options):
    landscape, theta = net
    state = stepped(landscape, theta, name, **options)
    angle = gradient(landscape, theta, state)["update_angle"]

    g, (p,) = samples.mean(0), state.parameters
    with torch.no_grad():
        p.copy_(theta)
    p.grad = g.clone()
    state.optimizer.step()
    u = p.detach() - theta
    assert angle.value == pytest.approx(degrees(-g, u), rel=1e-9) and angle.value > 10
    wanted = jackknife(lambda mean: degrees(-mean, u), samples)
    assert angle.errors["data"] == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize(("sign", "wanted"), [(1, 0.0), (-1, 180.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plain_descent_has_no_angle_and_ascent_the_largest(dtype, sign, wanted):
    model, x, y = images()
    landscape = Landscape(model.to(dtype), x.to(dtype), y)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, maximize=sign < 0)
    angle = lsa.gradient(landscape, optimizer=optimizer)["update_angle"]
    assert (angle.value, dict(angle.errors)) == (wanted, {})


def test_a_sharpness_aware_optimizer_has_no_step_from_a_gradient():
    model, x, y = images()
    optimizer = optimizers.build("SAM", model.parameters(), base="SGD", lr=0.1)
    found = lsa.gradient(Landscape(model, x, y), optimizer=optimizer)
    assert "update_angle" not in found.metrics
    assert any("no update_angle: SAM makes no step" in note for note in found.notes)


def test_where_the_gradient_is_zero_nothing_is_divided_by_it():
    model = seeded(lambda: nn.Linear(2, 1, bias=False)).double()
    x, theta = torch.eye(2).double(), flatten(model)
    landscape = Landscape(model, x, model(x).detach(), nn.MSELoss())
    found = gradient(landscape, theta)
    assert found["gradient_norm"].value == 0 and not found.curves
    assert any("the gradient is 0" in note for note in found.notes)


def test_batches_give_the_numbers_of_tensors_with_weights_too():
    model, x, y = images()
    weights = torch.tensor([1.0, 3.0, 2.0]).to(x)

    def objective(model: nn.Module, batch: Any) -> lsa.Terms:
        inputs, labels = batch
        each = F.cross_entropy(model(inputs), labels, weights, reduction="none")
        return lsa.Terms(each.sum(), weights[labels].sum(), each, weights[labels])

    def measured(landscape: Landscape) -> Result:
        optimizer = torch.optim.Adam(model.parameters())
        return lsa.gradient(landscape, optimizer=optimizer)

    plain = measured(Landscape(model, x, y, nn.CrossEntropyLoss(weights)))
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    streamed = measured(Landscape(model, batches, objective=objective))
    assert streamed.metrics.keys() == plain.metrics.keys()
    for name, metric in plain.metrics.items():
        assert streamed[name].value == pytest.approx(metric.value, rel=1e-6)
        assert streamed[name].errors == pytest.approx(metric.errors, rel=1e-5)
    for values in ("y", "error"):
        a, b = (getattr(r.curves["share_of_layer"], values) for r in (plain, streamed))
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_where_samples_interact_errors_are_over_batches():
    model, x, _ = images()

    def objective(model: nn.Module, batch: Tensor) -> lsa.Terms:
        z = F.normalize(model(batch), dim=1)
        loss = F.cross_entropy(5 * z @ z.T, torch.arange(len(z)), reduction="sum")
        return lsa.Terms(loss, len(z))

    landscape = Landscape(model, list(x.split(3)), objective=objective)
    found = lsa.gradient(landscape)
    exact = landscape.gradient(flatten(model)).norm().item()
    assert found["gradient_norm"].value == pytest.approx(exact)
    assert found["gradient_norm"].errors["data"] > 0
    assert any("standard errors are over batches" in note for note in found.notes)
