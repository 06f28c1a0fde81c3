"""Energies of points on a path: losses on mini-batches for its training, and of every sample."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lsa.landscape.batched import Batched
from lsa.landscape.landscape import Landscape
from lsa.maths.paths.neb import EnergyFunction
from lsa.maths.paths.polyline import Points


class Sampled(NamedTuple):
    """One point on a split, sample by sample, in float64."""

    losses: Tensor  # (N,)
    wrong: Tensor | None  # (N,) 0 or 1; None when the task is not classification


class SampledPoints:
    """Points evaluated on a split, with batch-norm statistics of the landscape at each point.

    Every point is evaluated once: the paths that are compared have many in common, and the errors
    of their maxima need the single samples again.
    """

    def __init__(self, landscape: Landscape, split: Landscape, say: Callable[[str], None]) -> None:
        self.landscape, self.split, self._say = landscape, split, say
        self.known: dict[bytes, Sampled] = {}

    def at(self, theta: Tensor) -> Sampled:
        """Losses and mistakes of each sample at θ `(d,)`."""
        key = hashlib.blake2b(theta.cpu().numpy().data, digest_size=16).digest()
        if key not in self.known:
            self._say(f"evaluating points: {len(self.known) + 1}")
            recalibrated = self.landscape.recalibrated(theta).with_data_of(self.split)
            losses, wrong = recalibrated.per_sample(theta)
            self.known[key] = Sampled(losses.double(), None if wrong is None else wrong.double())
        return self.known[key]

    def energies(self, points: Iterable[Tensor]) -> Tensor:
        """Mean loss at M points `(d,)`, shape `(M,)`."""
        return torch.stack([self.at(point).losses.mean() for point in points])

    def height(self, pivots: Tensor, between: int) -> float:
        """Largest mean loss at the pivots `(P, d)` and at `between` points inside each segment."""
        return self.energies(Points(pivots, between)).max().item()


def mini_batches(training: Landscape, batch_size: int, rng: torch.Generator) -> EnergyFunction:
    """A function of points `(P, d)` that returns their losses and gradients on one mini-batch.

    Each call draws a new mini-batch of a training split on tensors. On batches it takes the next
    batch, or all of them where they hold no more than `batch_size` samples.

    Args:
        training: The split from which mini-batches are drawn.
        batch_size: Samples per mini-batch.
        rng: Draws the samples; on the CPU.
    """
    if isinstance(training.data, Batched):
        return _given_batches(training, batch_size)
    gradient_on, n = training.on_batch_statistics().batch_gradient(), training.n_samples

    def energy(points: Tensor, _: int) -> tuple[Tensor, Tensor]:
        x, y = training.x, training.y
        if batch_size < n:
            chosen = torch.randperm(n, generator=rng)[:batch_size].to(x.device)
            x, y = x[chosen], y[chosen]
        values, gradients = zip(*(gradient_on(point, x, y) for point in points), strict=True)
        return torch.stack(values), torch.stack(gradients)

    return energy


def _given_batches(training: Landscape, batch_size: int) -> EnergyFunction:
    own = training.on_batch_statistics()
    turns = own.batches_in_turn()

    def undivided(theta: Tensor) -> tuple[Tensor, Tensor]:
        loss, gradient = own.loss_and_gradient(theta)
        return torch.tensor(loss, dtype=torch.float64, device=theta.device), gradient

    def energy(points: Tensor, _: int) -> tuple[Tensor, Tensor]:
        on = undivided if batch_size >= training.n_samples else next(turns)
        values, gradients = zip(*(on(point) for point in points), strict=True)
        return torch.stack(values), torch.stack(gradients)

    return energy


def gradient_by_batches(landscape: Landscape, theta: Tensor, batch_size: int) -> Tensor:
    """∇L(θ) `(d,)` in float64.

    A network with batch norm is measured in training mode, as the mean over mini-batches that
    together hold all samples.

    Args:
        landscape: What is measured.
        theta: θ `(d,)`.
        batch_size: Samples per mini-batch, about.
    """
    by_batch = landscape.on_batch_statistics()
    if by_batch is landscape or isinstance(landscape.data, Batched):
        return by_batch.gradient(theta).double()
    n, total = landscape.n_samples, torch.zeros_like(theta, dtype=torch.float64)
    for part in torch.arange(n, device=theta.device).tensor_split(max(1, n // batch_size)):
        total.add_(by_batch.subset(part).gradient(theta), alpha=len(part) / n)
    return total
