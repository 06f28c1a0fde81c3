"""Training in a subspace against minima in closed form, and what it must leave alone."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsa.landscape import Landscape, flatten
from lsa.landscape.subspace_training import (
    Budget,
    SubspaceTrainer,
    _factor,
    _gradient,
    _training_network,
)
from lsa.maths.subspaces import KINDS, Projection, make_projection

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def filled(model: nn.Module) -> nn.Module:
    """In float64, with weights that are drawn from a generator of our own."""
    model = model.double()
    for i, p in enumerate(model.parameters()):
        p.data = 0.5 * normal(*p.shape, seed=100 + i)
    return model


def layer(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    return nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias)


def trainer(
    landscape: Landscape, start: Tensor, kind: str = "fastfood", **budget
) -> SubspaceTrainer:
    wanted = Budget(**({"epochs": 1, "batch_size": 64, "lr": 0.01} | budget))
    return SubspaceTrainer(landscape, landscape, start, kind, wanted)


def projection(found: SubspaceTrainer, d: int, seed: int = 0) -> Projection:
    options = {"dtype": found.start.dtype}
    return make_projection(found.kind, len(found.start), d, generator(seed), **options)


def matrix(p: Projection) -> Tensor:
    return torch.stack([p.expand(e) for e in torch.eye(p.d, dtype=torch.float64)], dim=1)


# --- minima known in closed form ------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [5, 20])
def test_group_sums_reach_the_projected_minimum(kind: str, d: int) -> None:
    # Li et al. 2018, §2: the sum over each of ten groups of 100 parameters is prescribed.
    target = torch.arange(1.0, 11, dtype=torch.float64)
    model = filled(layer(100, 10, bias=False))
    x = torch.ones(1, 100, dtype=torch.float64)
    landscape = Landscape(model, x, target[None], lambda o, y: (o - y).square().sum())
    start = flatten(model)
    found = trainer(landscape, start, kind, epochs=1500, lr=0.1)
    run = found.train(d, seed=3)
    S = matrix(projection(found, d, seed=3)).view(10, 100, d).sum(1)
    missing = target - start.view(10, 100).sum(1)
    best = (S @ torch.linalg.pinv(S) @ missing - missing).square().sum().item()
    assert (best < 1e-20) == (d == 20)
    assert landscape.loss(found.point(run)) == pytest.approx(best, rel=1e-6, abs=1e-6)


def test_all_dimensions_reach_the_optimum_of_softmax_regression() -> None:
    x, noise = normal(60, 4), normal(60, 3, seed=5)
    y = (x[:, :3] + 2 * noise).argmax(1)  # overlapping classes: the optimum is finite
    model = filled(layer(4, 3))
    landscape = Landscape(model, x, y)
    start = flatten(model)
    theta = start.clone()
    direct = torch.optim.LBFGS([theta], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> float:
        loss, theta.grad = landscape.loss_and_gradient(theta)
        return loss

    direct.step(closure)
    best = landscape.loss(theta)
    found = trainer(landscape, start, "dense", epochs=1500, lr=0.05)
    assert landscape.loss(start) > best + 0.1
    reached = landscape.loss(found.point(found.train(15, seed=0)))
    assert reached == pytest.approx(best, abs=1e-5)


# --- one step -------------------------------------------------------------------------------------


def test_the_gradient_in_the_subspace_is_the_slope_of_the_loss() -> None:
    model = filled(nn.Sequential(layer(4, 5), nn.Tanh(), layer(5, 3)))
    landscape = Landscape(model, normal(7, 4), torch.arange(7) % 3)
    found = trainer(landscape, flatten(model))
    p, z, h = projection(found, 6), normal(6, seed=9), 1e-5
    theta = found.start + p.expand(z)
    network = _training_network(landscape)
    slopes = p.restrict(_gradient(landscape, network, theta, landscape.x, landscape.y))
    for i, e in enumerate(torch.eye(6, dtype=torch.float64)):
        up, down = (landscape.loss(theta + s * h * p.expand(e)) for s in (1, -1))
        assert slopes[i].item() == pytest.approx((up - down) / (2 * h), abs=1e-8)


@pytest.mark.parametrize("d", [2, 16])
def test_a_first_step_moves_as_far_in_every_dimension(d: int) -> None:
    model = filled(layer(9, 3))
    landscape = Landscape(model, normal(8, 9), torch.arange(8) % 3)
    run = trainer(landscape, flatten(model), lr=0.02).train(d, seed=0)
    # Adam's first step is its rate in every coordinate: |z| = lr √(D/d) √d, up to its ε.
    assert run.z.norm().item() == pytest.approx(0.02 * math.sqrt(30), rel=1e-4)


def test_the_rate_rises_for_a_tenth_and_falls_to_zero() -> None:
    factors = [_factor(i / 40, 1 / 40) for i in range(40)]
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 0.925])
    assert factors[4:] == pytest.approx([1 - i / 40 for i in range(4, 40)])


@pytest.mark.parametrize("kind", KINDS)
def test_training_starts_at_the_start_exactly(kind: str) -> None:
    model = filled(layer(9, 3))
    landscape = Landscape(model, normal(8, 9), torch.arange(8) % 3)
    found = trainer(landscape, flatten(model), kind, lr=0.0)
    run = found.train(5, seed=0)
    assert torch.equal(found.point(run), found.start)
    assert run.accuracy == 1 - landscape.evaluate(found.start).error


def test_progress_counts_every_batch_and_batches_are_even() -> None:
    model = filled(nn.Sequential(layer(4, 5), nn.BatchNorm1d(5), layer(5, 3)))
    landscape = Landscape(model, normal(9, 4), torch.arange(9) % 3)
    told: list[tuple] = []
    # Batches of 8 and 1 would fail: batch norm cannot normalise one sample by itself.
    found = trainer(landscape, flatten(model), epochs=3, batch_size=8)
    found.train(4, 0, lambda *a: told.append(a))
    assert told == [(i, 6) for i in range(1, 7)]


# --- layers that behave differently in training ---------------------------------------------------


def normed() -> tuple[nn.Sequential, Landscape]:
    model = nn.Sequential(layer(5, 8), nn.BatchNorm1d(8), nn.ReLU(), layer(8, 3))
    model = filled(model)
    x = 3 * normal(40, 5) + 2  # far from the initial statistics, 0 and 1
    return model, Landscape(model, x, torch.arange(40) % 3)


def test_batch_norm_trains_on_the_statistics_of_the_batch() -> None:
    model, landscape = normed()
    before = copy.deepcopy(landscape.model.state_dict())
    batch = torch.arange(10, 20)
    network = _training_network(landscape)
    g = _gradient(landscape, network, flatten(model), landscape.x[batch], landscape.y[batch])
    model.train()
    loss = F.cross_entropy(model(landscape.x[batch]), landscape.y[batch])
    expected = torch.autograd.grad(loss, list(model.parameters()))
    assert torch.allclose(g, torch.cat([e.flatten() for e in expected]), rtol=0, atol=1e-12)
    after = landscape.model.state_dict()
    assert not landscape.model.training
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_batch_norm_is_judged_with_statistics_of_the_training_data() -> None:
    model, landscape = normed()
    found = trainer(landscape, flatten(model), "dense", epochs=30, batch_size=20)
    theta, x = found.point(found.train(20, seed=0)), 3 * normal(50, 5, seed=7) + 2
    weights = landscape.unflatten(theta)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    hidden = linear(landscape.x, "0")
    mean, deviation = hidden.mean(0), (hidden.var(0) + 1e-5).sqrt()
    hidden = (linear(x, "0") - mean) / deviation * weights["1.weight"] + weights["1.bias"]
    classes = linear(hidden.relu(), "3").argmax(1)
    held_out = landscape.with_data(x, classes)
    assert replace(found, validation=held_out).accuracy(theta) == 1
    assert held_out.evaluate(theta).error > 0  # with the statistics of the start


def test_dropout_stays_off() -> None:
    def end(p: float) -> Tensor:
        model = filled(nn.Sequential(layer(5, 8), nn.Dropout(p), layer(8, 3))).train()
        landscape = Landscape(model, normal(40, 5), torch.arange(40) % 3)
        return trainer(landscape, flatten(model), epochs=2).train(9, seed=0).z

    assert torch.equal(end(0.9), end(0.0))


# --- divergence -----------------------------------------------------------------------------------


def test_a_diverged_training_scores_chance_level_and_stays_not_finite() -> None:
    model = filled(nn.Sequential(layer(5, 8), nn.ReLU(), layer(8, 4)))
    landscape = Landscape(model, normal(40, 5), torch.zeros(40, dtype=torch.int64))
    told: list[int] = []
    found = trainer(landscape, flatten(model), epochs=5, lr=1e200)
    run = found.train(9, 0, lambda done, total: told.append(done))
    assert run.diverged and run.accuracy == 1 / 4
    assert not found.point(run).isfinite().all()
    assert told[-1] < 5  # and ends early
