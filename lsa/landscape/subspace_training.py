"""Training of a network inside a random affine subspace θ₀ + P z of its parameters.

Only z `(d,)` is trained, from zero (Li, Farkhoor, Liu & Yosinski 2018).

Adam moves every coordinate by about its rate, so a step moves θ by rate · √d. The rate used is
lr √(D/d), which moves θ as far as Adam at `lr` does without a subspace. On digits (mlp, simple_cnn;
d = 8 … 8192) the same lr then suits every d, while the best unscaled rates differ by a factor of
10. The best lr there is 0.01. At that rate the reference network fails on CIFAR-10 (d = 5000),
where 0.005 works.

The rate falls linearly to zero. The last epoch is then within 0.01 of the best one (within 0.04 at
a constant rate), so that none needs to be selected on the validation data. The rate rises over the
first tenth; without that, large subspaces of a convolutional network fail on short budgets (0.60
against 0.93 at d = 8192).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lsa.landscape.copies import duplicate
from lsa.landscape.derivatives import batch_norm
from lsa.landscape.derivatives.precision import full_float32
from lsa.landscape.derivatives.replay import replayed
from lsa.landscape.landscape import Landscape
from lsa.maths.subspaces import Projection, make_projection
from lsa.runtime.progress import Report

WARM_UP = 0.1  # of the steps (tuned here)
CALIBRATION = 2048  # training samples that settle batch-norm statistics (tuned here)


@dataclass(frozen=True)
class Budget:
    """Options of a training in a subspace."""

    epochs: int
    batch_size: int
    lr: float  # Adam's highest rate, per coordinate of the whole space


@dataclass(frozen=True)
class Trained:
    """One training in a random subspace, and how well its end classifies the validation data."""

    d: int
    seed: int  # of P and of the batch order
    z: Tensor  # (d,)
    accuracy: float  # chance level when it diverged
    diverged: bool


@dataclass(frozen=True)
class SubspaceTrainer:
    """Trains one network from one start in random subspaces, each given by its d and seed."""

    training: Landscape
    validation: Landscape
    start: Tensor  # θ₀ (D,)
    kind: str  # of P
    budget: Budget

    def train(self, d: int, seed: int, report: Report | None = None) -> Trained:
        """Train in a random subspace, and evaluate the last point.

        Args:
            d: Dimension of the subspace.
            seed: Of the subspace and of the mini-batches.
            report: Called as `report(done, total, text)`.
        """
        rng, projection = self._projection(d, seed)
        z = train_in_subspace(self.training, self.start, projection, rng, self.budget, report)
        accuracy = self.accuracy(self.start + projection.expand(z))
        diverged = math.isnan(accuracy)
        return Trained(d, seed, z, self._chance() if diverged else accuracy, diverged)

    def point(self, trained: Trained) -> Tensor:
        """θ₀ + P z `(D,)` of a finished training, P drawn anew from its seed."""
        return self.start + self._projection(trained.d, trained.seed)[1].expand(trained.z)

    def accuracy(self, theta: Tensor) -> float:
        """Validation accuracy at θ; nan when the loss is not finite.

        Batch-norm statistics are estimated anew at θ, on 2,048 training samples (the same always),
        so that they belong to θ and not to the path that led there.
        """
        fixed = torch.Generator().manual_seed(0)
        order = torch.randperm(self.training.n_samples, generator=fixed)[:CALIBRATION]
        sample = self.training.subset(order.to(theta.device))
        settled = sample.recalibrated(theta)
        where = self.validation if settled is sample else self.validation.with_model(settled.model)
        evaluated = where.evaluate(theta)
        return 1 - evaluated.error if math.isfinite(evaluated.loss) else math.nan

    def _projection(self, d: int, seed: int) -> tuple[torch.Generator, Projection]:
        rng = torch.Generator().manual_seed(seed)
        kwargs = {"dtype": self.start.dtype, "device": self.start.device}
        return rng, make_projection(self.kind, len(self.start), d, rng, **kwargs)

    def _chance(self) -> float:
        """Accuracy of guessing among the network's outputs."""
        return 1 / self.validation.outputs(self.start, self.validation.x[:1]).shape[1]


def train_in_subspace(
    landscape: Landscape,
    start: Tensor,
    projection: Projection,
    rng: torch.Generator,
    budget: Budget,
    report: Report | None = None,
) -> Tensor:
    """Minimise L(θ₀ + P z) over z by Adam on mini-batches.

    Batch norm normalises by the batch, as in ordinary training; dropout stays off, as in the
    landscape itself.

    Args:
        landscape: Of the training data; its model is not changed.
        start: θ₀ `(D,)`.
        projection: P.
        rng: Of the batch order, on the CPU.
        budget: Epochs, largest batch (all are as even as can be) and rate.
        report: Told the number of finished batches.

    Returns:
        z `(d,)`, not finite when training diverged.
    """
    network = _training_network(landscape)
    z = torch.zeros(projection.d, dtype=start.dtype, device=start.device)
    rate = budget.lr * math.sqrt(projection.dimension / projection.d)
    optimizer = torch.optim.Adam([z], lr=rate)

    def slope(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
        theta = start + projection.expand(z)
        return projection.restrict(_gradient(landscape, network, theta, x, y))

    slope_of = replayed(slope, start.device)
    n = landscape.n_samples
    steps = -(-n // budget.batch_size)
    total = budget.epochs * steps
    for epoch in range(budget.epochs):
        if not z.isfinite().all():
            break
        order = torch.randperm(n, generator=rng).to(start.device)
        for step, batch in enumerate(order.tensor_split(steps), epoch * steps):
            z.grad = slope_of(z, landscape.x[batch], landscape.y[batch])
            optimizer.param_groups[0]["lr"] = rate * _factor(step / total, 1 / total)
            optimizer.step()
            if report:
                report(step + 1, total)
    return z


def _factor(done: float, step: float) -> float:
    """Factor of the learning rate after a fraction `done` of the training: up, then down to 0."""
    return min((done + step) / WARM_UP, 1 - done)


def _training_network(landscape: Landscape) -> nn.Module:
    """A copy of the network whose batch norm uses the statistics of the batch."""
    network = duplicate(landscape.model)
    for layer in batch_norm.layers(network):
        layer.train()
    return network


@full_float32()
@torch.enable_grad()
def _gradient(
    landscape: Landscape, network: nn.Module, theta: Tensor, x: Tensor, y: Tensor
) -> Tensor:
    """∇_θ of the loss on one batch, `(D,)`."""
    t = theta.detach().requires_grad_()
    loss = landscape.loss_function(functional_call(network, landscape.unflatten(t), (x,)), y)
    return torch.autograd.grad(loss, t)[0]
