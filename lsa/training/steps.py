"""One optimizer step, in passes that stay in the cache, and what it measures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from lsa.landscape.derivatives import batch_norm
from lsa.landscape.derivatives.budget import cache_size
from lsa.landscape.terms import Objective
from lsa.probe import Report
from lsa.project import Recipe
from lsa.training import losses, optimizers
from lsa.training.data import Data, Streams


@dataclass
class Loop:
    """The state of a training between epochs."""

    recipe: Recipe
    split: Data | Streams
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: losses.Loss  # of tensors
    objective: Objective | None  # of batches
    factor: Callable[[int], float]  # of the learning rate at each step
    base: list[float]  # learning rate of each group without the factor
    rng: torch.Generator
    average: nn.Module | None = None  # exponential average of the weights, where asked for
    report: Report | None = None

    @property
    def measured(self) -> nn.Module:
        """The network that is evaluated and kept."""
        return self.model if self.average is None else self.average

    def state(self, number: int) -> dict[str, Any]:
        """The state from which `train` continues after an epoch."""
        kept = {
            "epoch": number,
            "model": self.measured.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": self.rng.get_state(),
            "base_lr": self.base,
        }
        return kept if self.average is None else {**kept, "stepped": self.model.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to a state."""
        self.model.load_state_dict(state.get("stepped", state["model"]))
        if self.average is not None:
            self.average.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rng.set_state(state["rng"])
        self.base = list(state["base_lr"])


@torch.no_grad()
def averaged(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the exponential average of the weights by one step.

    The decay is min(β, (1+t)/(10+t)), so that the initial weights are soon forgotten (the rule of
    TensorFlow's ExponentialMovingAverage).

    Args:
        average: The network with averaged weights, changed in place. Its buffers are copies of the
            model's.
        model: The network after the step.
        decay: β.
        step: t.
    """
    weight = 1 - min(decay, (1 + step) / (10 + step))
    for kept, now in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(now, weight)
    for kept, now in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(now)


def take_step(
    loop: Loop, parameters: list[nn.Parameter], x: Tensor, y: Tensor, size: int
) -> tuple[Tensor, list[Tensor]]:
    """One optimizer step on a batch, computed in several passes.

    Figures are summed up at the epoch's end: within a step, one operation on a few numbers takes a
    quarter of a percent of an mlp's time.

    Args:
        loop: Network, optimizer and loss.
        parameters: Of the network.
        x: Inputs `(n, …)`.
        y: Targets `(n, …)`.
        size: Samples per pass, at most.

    Returns:
        At the first evaluation the mean loss, followed by squared norms of parts of the gradient,
        one or more; and of each sample, pass by pass, whether it is correct, nan where there are
        no classes.

    Raises:
        InputError: The optimizer does not call its closure.
    """
    first: list[tuple[Tensor, list[Tensor]]] = []

    def closure() -> Any:
        loop.optimizer.zero_grad()
        losses, correct = [], []
        for inputs, targets in _passes(x, y, size):
            outputs = loop.model(inputs)
            loss = loop.loss(outputs, targets)
            if len(inputs) < len(x):
                loss = loss * (len(inputs) / len(x))
            loss.backward()
            losses.append(loss.detach())
            if classifies(outputs, targets):
                correct.append(outputs.detach().argmax(1) == targets)
            else:
                correct.append(torch.full((len(inputs),), math.nan, device=x.device))
        loss = reduce(torch.add, losses)
        if not first:  # SAM and LBFGS evaluate again elsewhere
            gradients = [p.grad for p in parameters if p.grad is not None]
            figures = torch.stack([loss, *_squared_norms(gradients)])
            first.append((figures, correct))
        if limit := loop.recipe.train.clip_norm:
            nn.utils.clip_grad_norm_(parameters, limit)
        return loss

    optimizers.step(loop.optimizer, closure)
    return first[0]


def means(batches: Iterable[tuple[Tensor, list[Tensor]]], batch_size: int) -> list[float]:
    """Means over the samples of an epoch: loss, accuracy and gradient norm.

    Args:
        batches: From `take_step`: figures `(1 + parts,)` and correctness `(n,)` of each step.
        batch_size: Samples of every step but the last.
    """
    figures, correct = zip(*batches, strict=True)
    right = torch.cat([part for parts in correct for part in parts])
    # Padded, because a parameter may have had no gradient in some steps.
    table = nn.utils.rnn.pad_sequence(list(figures), batch_first=True).double()
    share = table.new_full((len(table),), batch_size / len(right))
    share[-1] = 1 - (len(table) - 1) * batch_size / len(right)
    norms = table[:, 1:].sum(1).sqrt()
    return torch.stack([share @ table[:, 0], right.double().mean(), share @ norms]).tolist()


def _passes(x: Tensor, y: Tensor, size: int) -> Iterable[tuple[Tensor, Tensor]]:
    """A batch in parts of at most a size."""
    return zip(x.split(size), y.split(size), strict=True) if len(x) > size else [(x, y)]


def _squared_norms(gradients: list[Tensor]) -> list[Tensor]:
    """Squared norms of parts of the gradient, scalars that add to that of the whole.

    A CPU's products of vectors read it in 0.6 of the time of `get_total_norm`, which is a tenth of
    a step of an mlp.
    """
    if gradients[0].device.type != "cpu":
        return [torch.nn.utils.get_total_norm(gradients).square()]
    return [torch.dot(g, g) for g in map(torch.flatten, gradients)]


def pass_size(model: nn.Module, x: Tensor) -> int:
    """Most samples of a batch x `(n, …)` per pass: all, or on a CPU as many as the cache holds.

    Parts of 32 CIFAR images measured 1.4 times faster than a batch of 128 at once on an EPYC, parts
    of 64 1.2 times on a Xeon. With batch norm the samples of a batch depend on each other, so it is
    not divided.
    """
    undivided = x.device.type != "cpu" or batch_norm.layers(model)
    return len(x) if undivided else cache_size(model, x)


def classifies(outputs: Tensor, targets: Tensor) -> bool:
    """Whether outputs are logits `(n, classes)` and targets class numbers `(n,)`."""
    return outputs.ndim == 2 and targets.ndim == 1 and not targets.is_floating_point()
