"""The training loop: a generator that yields after every epoch, so whoever drives it may log, save
or stop. Nothing here knows about tracking or files."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsa.landscape import Landscape, flatten, noise_scale
from lsa.landscape.derivatives import batch_norm
from lsa.landscape.derivatives.budget import cache_size, image_layout, laid_out
from lsa.probe import Metric, Report
from lsa.project import Recipe
from lsa.runtime.errors import Diverged, InputError
from lsa.training import data, losses, optimizers, schedules
from lsa.training.data import Data
from lsa.training.recipes import loss_of, network

STATE = {"epoch", "model", "optimizer", "rng", "base_lr"}  # what `Epoch.state` holds


Watch = Callable[[nn.Module, torch.optim.Optimizer, int], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Epoch:
    """One finished epoch: its number (from 1), what was measured, and the state to go on from."""

    number: int
    metrics: Mapping[str, float]
    state: Mapping[str, Any]  # storable by `lsa.tracking.serial`; `train` goes on from it


def initial(recipe: Recipe, split: Data, trusted: Collection[str] = ()) -> dict[str, Any]:
    """Epoch, weights and optimizer state before the first step, as `Epoch.state` names them.

    The learning rate is that of the first step; in `Epoch.state` it is that of the last.
    """
    model = network(recipe, split, trusted)
    rule = recipe.rule
    optimizer = optimizers.build(rule.name, model.parameters(), trusted=trusted, **rule.options)
    for group in optimizer.param_groups:
        group["lr"] *= _schedule(recipe, split, trusted)(0)
    return {"epoch": 0, "model": model.state_dict(), "optimizer": optimizer.state_dict()}


@dataclass
class _Loop:
    """What a training holds from one epoch to the next."""

    recipe: Recipe
    split: Data
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: losses.Loss
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
        """What `train` goes on from after an epoch."""
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


def train(
    recipe: Recipe,
    split: Data,
    *,
    trusted: Collection[str] = (),
    state: Mapping[str, Any] | None = None,
    report: Report | None = None,
    watch: Watch | None = None,
) -> Iterator[Epoch]:
    """Train by the recipe, yielding every finished epoch.

    Initial weights, batch order and augmentation follow from the recipe's seed alone, so two runs
    on one machine and thread count agree bit for bit, also when one was interrupted and went on
    from a yielded state. On a GPU they agree only as far as its kernels do, which add in any order.

    Args:
        recipe: Model, loss, optimizer, schedule and budget.
        split: Data on the device that shall compute.
        trusted: Packages whose factories may be imported.
        state: An earlier `Epoch.state`; training continues after it.
        report: Told the number of finished batches.
        watch: Given the network, its optimizer and the number of steps before, a context in which
            the steps are made.

    Raises:
        InputError: The recipe names something that does not exist or does not fit.
        Diverged: A loss is not finite.
    """
    model = network(recipe, split, trusted).to(split.x_train.device)
    rule = recipe.rule
    optimizer = optimizers.build(rule.name, model.parameters(), trusted=trusted, **rule.options)
    loop = _Loop(
        recipe=recipe,
        split=split,
        model=model,
        optimizer=optimizer,
        loss=loss_of(recipe, trusted),
        factor=_schedule(recipe, split, trusted),
        base=[group["lr"] for group in optimizer.param_groups],
        rng=torch.Generator().manual_seed(recipe.seed),
        average=copy.deepcopy(model) if recipe.train.ema else None,
        report=report,
    )
    if state is not None:
        loop.restore(state)
    first = state["epoch"] + 1 if state else 1
    before = (first - 1) * _steps(recipe, split)
    with watch(model, optimizer, before) if watch else contextlib.nullcontext():
        yield from _epochs(loop, first)


def _epochs(loop: _Loop, first: int) -> Iterator[Epoch]:
    """The epochs from a number on."""
    recipe, split = loop.recipe, loop.split
    for number in range(first, recipe.train.epochs + 1):
        started = time.perf_counter()
        metrics = _epoch(loop, number)
        metrics["train/seconds"] = time.perf_counter() - started
        metrics |= _validation(loop.measured, split, loop.loss)
        if recipe.train.noise_scale:
            metrics |= _noise(loop.measured, split, loop.loss, number)
        yield Epoch(number, metrics, loop.state(number))


def _schedule(recipe: Recipe, split: Data, trusted: Collection[str]) -> Callable[[int], float]:
    """Factor of the learning rate at each step."""
    return schedules.schedule(
        recipe.train.schedule.name,
        epochs=recipe.train.epochs,
        steps_per_epoch=_steps(recipe, split),
        trusted=trusted,
        **recipe.train.schedule.options,
    )


def _steps(recipe: Recipe, split: Data) -> int:
    """Steps of an epoch."""
    return -(-len(split.x_train) // recipe.train.batch_size)


def _epoch(loop: _Loop, number: int) -> dict[str, float]:
    """One pass over the training split; means of loss, accuracy and gradient norm over it."""
    model, optimizer, split, budget = loop.model, loop.optimizer, loop.split, loop.recipe.train
    model.train()
    optimizers.switch(optimizer, training=True)
    n, device = len(split.x_train), split.x_train.device
    steps = -(-n // budget.batch_size)
    figures: list[tuple[Tensor, list[Tensor]]] = []  # of every step, what `_step` returns
    parameters = [p for p in model.parameters() if p.requires_grad]
    size = _pass_size(model, split.x_train) if loop.loss is F.cross_entropy else n
    layout = image_layout(model, split.x_train)
    for i, index in enumerate(data.batches(n, budget.batch_size, loop.rng)):
        index = index.to(device)
        x, y = split.x_train.index_select(0, index), split.y_train.index_select(0, index)
        if budget.augment.crop or budget.augment.flip:
            x = data.augment(x, loop.rng, crop=budget.augment.crop, flip=budget.augment.flip)
        x = laid_out(x, layout)
        step = (number - 1) * steps + i
        for group, lr in zip(optimizer.param_groups, loop.base, strict=True):
            group["lr"] = lr * loop.factor(step)
        try:
            figures.append(_step(loop, parameters, x, y, size))
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise InputError(
                f"batch norm has no variance over a batch of 1 sample, and batch_size="
                f"{budget.batch_size} leaves one of {n}; choose another batch_size"
            ) from None
        if loop.average is not None and budget.ema is not None:
            _averaged(loop.average, model, budget.ema, step)
        if loop.report is not None:
            loop.report(step + 1, budget.epochs * steps, f"epoch {number}/{budget.epochs}")
    optimizers.switch(optimizer, training=False)
    loss, accuracy, norm = _means(figures, budget.batch_size)
    if not math.isfinite(loss + norm):
        raise Diverged(
            f"training of {loop.recipe.optimizer} diverged in epoch {number} (loss {loss:.3g}); "
            f"lower its learning rate (now {loop.base[0]:g})"
        )
    metrics = {
        "train/loss": loss,
        "train/accuracy": accuracy,
        "train/gradient_norm": norm,
        "train/weight_norm": flatten(model).double().norm().item(),
        "train/learning_rate": optimizer.param_groups[0]["lr"],
    }
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


@torch.no_grad()
def _averaged(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the exponential average of the weights by one step; other buffers are the model's.

    The decay rises to its value as min(β, (1+t)/(10+t)), so that the initial weights are soon
    forgotten (the rule of TensorFlow's ExponentialMovingAverage).
    """
    weight = 1 - min(decay, (1 + step) / (10 + step))
    for kept, now in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(now, weight)
    for kept, now in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(now)


def _step(
    loop: _Loop, parameters: list[nn.Parameter], x: Tensor, y: Tensor, size: int
) -> tuple[Tensor, list[Tensor]]:
    """One optimizer step in passes of a size.

    To sum and to count is left to the epoch's end: once in a step, an operation on a few numbers
    takes a quarter of a percent of an mlp's.

    Returns:
        At the first evaluation the mean loss, followed by squared norms of parts of the gradient,
        one or more; and of each sample, pass by pass, whether it is correct, nan where there are
        no classes.

    Raises:
        InputError: The optimizer evaluates nothing.
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

    loop.optimizer.step(closure)
    if not first:
        raise InputError(
            f"{type(loop.optimizer).__name__}.step does not call the closure that it is given, so "
            "there is no gradient; let it do so first, as those of torch.optim do"
        )
    return first[0]


def _means(batches: Iterable[tuple[Tensor, list[Tensor]]], batch_size: int) -> list[float]:
    """Loss, accuracy and gradient norm, means over the samples, of what `_step` has returned."""
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


def _pass_size(model: nn.Module, x: Tensor) -> int:
    """Samples per pass at most: a whole batch, or on a CPU parts of it that stay in the cache.

    Parts of 32 CIFAR images measured 1.4 times faster than a batch of 128 at once on an EPYC, parts
    of 64 1.2 times on a Xeon. With batch norm the samples of a batch depend on each other, so it is
    not divided.
    """
    undivided = x.device.type != "cpu" or batch_norm.layers(model)
    return len(x) if undivided else cache_size(model, x)


def classifies(outputs: Tensor, targets: Tensor) -> bool:
    """Whether outputs are logits `(n, classes)` and targets class numbers `(n,)`."""
    return outputs.ndim == 2 and targets.ndim == 1 and not targets.is_floating_point()


def _validation(model: nn.Module, split: Data, loss: losses.Loss) -> dict[str, float]:
    evaluation = Landscape(model, split.x_val, split.y_val, loss).evaluate(flatten(model))
    values = {"val/loss": evaluation.loss, "val/accuracy": 1 - evaluation.error}
    return {name: value for name, value in values.items() if not math.isnan(value)}


def _noise(model: nn.Module, split: Data, loss: losses.Loss, number: int) -> dict[str, float]:
    """Gradient noise at an epoch's end, in evaluation mode, with the standard errors of the draw.

    The samples follow from the epoch's number alone: the same for every optimizer and seed, and
    nothing is drawn from the generator that training uses.
    """
    n = len(split.x_train)
    if n < noise_scale.PARTS:
        return {}
    drawn = noise_scale.draw(n, torch.Generator().manual_seed(number)).to(split.x_train.device)
    # Not a landscape of the whole split, which would copy it into the layout of its own.
    batches = [(split.x_train.index_select(0, part), split.y_train[part]) for part in drawn]
    first = Landscape(model, *batches[0], loss)
    landscapes = (first.with_data(x, y) for x, y in batches)
    scale = noise_scale.of_batches(landscapes, flatten(model), n)
    # Where noise hides the gradient there is no noise scale, and no point in its curve.
    return {f"train/{name}": value for name, value in scale.numbers().items()}


def final_metrics(
    model: nn.Module, split: Data, loss: losses.Loss = F.cross_entropy
) -> dict[str, Metric]:
    """Loss of a network on both whole splits, in evaluation mode, and accuracy where it has one."""
    metrics = {}
    theta = flatten(model)
    for name, x, y in (
        ("val", split.x_val, split.y_val),
        ("train", split.x_train, split.y_train),
    ):
        at = Landscape(model, x, y, loss).evaluate(theta)
        metrics[f"{name}_loss"] = Metric(at.loss, errors={"data": at.loss_error})
        if not math.isnan(at.error):
            metrics[f"{name}_accuracy"] = Metric(1 - at.error, errors={"data": at.error_error})
    return metrics
