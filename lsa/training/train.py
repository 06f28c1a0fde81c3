"""The training loop: a generator that yields after every epoch, so whoever drives it may log, save
or stop. Nothing here knows about tracking or files."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsa.landscape import Landscape, flatten, noise_scale
from lsa.landscape.derivatives.budget import image_layout, laid_out
from lsa.probe import Metric, Report
from lsa.project import Recipe
from lsa.runtime.errors import Diverged, InputError
from lsa.training import data, losses, objective_steps, optimizers, schedules
from lsa.training.data import Data, Streams
from lsa.training.recipes import check_fit, loss_of, network, objective_of
from lsa.training.steps import Loop, averaged, means, pass_size, take_step

STATE = {"epoch", "model", "optimizer", "rng", "base_lr"}  # what `Epoch.state` holds


Watch = Callable[[nn.Module, torch.optim.Optimizer, int], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Epoch:
    """One finished epoch: its number (from 1), what was measured, and the state to go on from."""

    number: int
    metrics: Mapping[str, float]
    state: Mapping[str, Any]  # storable by `lsa.tracking.serial`; `train` goes on from it


def initial(recipe: Recipe, split: Data | Streams, trusted: Collection[str] = ()) -> dict[str, Any]:
    """Epoch, weights and optimizer state before the first step, as `Epoch.state` names them.

    The learning rate is that of the first step; in `Epoch.state` it is that of the last.

    Raises:
        InputError: The recipe names something that does not exist or does not fit.
    """
    model = network(recipe, split, trusted)
    rule = recipe.rule
    optimizer = optimizers.build(rule.name, model.parameters(), trusted=trusted, **rule.options)
    for group in optimizer.param_groups:
        group["lr"] *= _schedule(recipe, split, trusted)(0)
    if isinstance(split, Data):
        check_fit(recipe, split, model, trusted)
    return {"epoch": 0, "model": model.state_dict(), "optimizer": optimizer.state_dict()}


def train(
    recipe: Recipe,
    split: Data | Streams,
    *,
    device: torch.device | str = "cpu",
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
        split: Data on the device that shall compute, or for an objective batches, each a step.
        device: Where batches are computed.
        trusted: Packages whose factories may be imported.
        state: An earlier `Epoch.state`; training continues after it.
        report: Told the number of finished batches.
        watch: Given the network, its optimizer and the number of steps before, a context in which
            the steps are made.

    Raises:
        InputError: The recipe names something that does not exist or does not fit.
        Diverged: A loss is not finite.
    """
    if isinstance(split, Data):
        device = split.x_train.device
    elif recipe.train.augment.crop or recipe.train.augment.flip:
        raise InputError("augment takes images as tensors; objectives augment in their batches")
    model = network(recipe, split, trusted).to(device)
    rule = recipe.rule
    optimizer = optimizers.build(rule.name, model.parameters(), trusted=trusted, **rule.options)
    loop = Loop(
        recipe=recipe,
        split=split,
        model=model,
        optimizer=optimizer,
        loss=loss_of(recipe, trusted),
        objective=objective_of(recipe, trusted) if recipe.objective else None,
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


def _epochs(loop: Loop, first: int) -> Iterator[Epoch]:
    """The epochs from a number on."""
    recipe, split = loop.recipe, loop.split
    for number in range(first, recipe.train.epochs + 1):
        started = time.perf_counter()
        if isinstance(split, Data):
            metrics = _epoch(loop, split, number)
        else:
            metrics = _epoch_of_batches(loop, split, number)
        metrics["train/seconds"] = time.perf_counter() - started
        metrics |= _validation(loop)
        if recipe.train.noise_scale and isinstance(split, Data):
            metrics |= _noise(loop.measured, split, loop.loss, number)
        yield Epoch(number, metrics, loop.state(number))


def _schedule(
    recipe: Recipe, split: Data | Streams, trusted: Collection[str]
) -> Callable[[int], float]:
    """Factor of the learning rate at each step."""
    return schedules.schedule(
        recipe.train.schedule.name,
        epochs=recipe.train.epochs,
        steps_per_epoch=_steps(recipe, split),
        trusted=trusted,
        **recipe.train.schedule.options,
    )


def _steps(recipe: Recipe, split: Data | Streams) -> int:
    """Steps of an epoch."""
    if isinstance(split, Streams):
        return split.steps
    return -(-len(split.x_train) // recipe.train.batch_size)


def _epoch_of_batches(loop: Loop, split: Streams, number: int) -> dict[str, float]:
    """One pass over the batches; loss and mean gradient norm over it."""
    assert loop.objective is not None
    model, optimizer, done = loop.model, loop.optimizer, (number - 1) * split.steps
    model.train()
    optimizers.switch(optimizer, training=True)
    loss, norm = objective_steps.epoch(
        model,
        optimizer,
        loop.objective,
        split.train,
        clip_norm=loop.recipe.train.clip_norm,
        before=lambda i: _set_rates(loop, done + i),
        after=lambda i: _stepped(loop, done + i, number, split.steps),
    )
    optimizers.switch(optimizer, training=False)
    return _figures(loop, number, loss, math.nan, norm)


def _set_rates(loop: Loop, step: int) -> None:
    for group, lr in zip(loop.optimizer.param_groups, loop.base, strict=True):
        group["lr"] = lr * loop.factor(step)


def _stepped(loop: Loop, step: int, number: int, steps: int) -> None:
    """Update the average of the weights and the progress after a step."""
    budget = loop.recipe.train
    if loop.average is not None and budget.ema is not None:
        averaged(loop.average, loop.model, budget.ema, step)
    if loop.report is not None:
        loop.report(step + 1, budget.epochs * steps, f"epoch {number}/{budget.epochs}")


def _figures(
    loop: Loop, number: int, loss: float, accuracy: float, norm: float
) -> dict[str, float]:
    """Metrics of an epoch that has ended.

    Raises:
        InputError: The loss or a gradient is not finite, since the data is not.
        Diverged: It is not finite for another reason.
    """
    if not math.isfinite(loss + norm):
        split = loop.split
        if isinstance(split, Data) and not all(map(_finite, (split.x_train, split.y_train))):
            raise InputError(
                f"dataset {loop.recipe.dataset.name} has inputs or targets that are not finite, so "
                f"the loss is {loss:.3g}; mend them"
            )
        raise Diverged(
            f"training of {loop.recipe.optimizer} diverged in epoch {number} (loss {loss:.3g}); "
            f"lower its learning rate (now {loop.base[0]:g})"
        )
    metrics = {
        "train/loss": loss,
        "train/accuracy": accuracy,
        "train/gradient_norm": norm,
        "train/weight_norm": flatten(loop.model).double().norm().item(),
        "train/learning_rate": loop.optimizer.param_groups[0]["lr"],
    }
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _epoch(loop: Loop, split: Data, number: int) -> dict[str, float]:
    """One pass over the training split; means of loss, accuracy and gradient norm over it."""
    model, optimizer, budget = loop.model, loop.optimizer, loop.recipe.train
    model.train()
    optimizers.switch(optimizer, training=True)
    n, device = len(split.x_train), split.x_train.device
    steps = -(-n // budget.batch_size)
    figures: list[tuple[Tensor, list[Tensor]]] = []  # of every step, what `take_step` returns
    parameters = [p for p in model.parameters() if p.requires_grad]
    size = pass_size(model, split.x_train) if loop.loss is F.cross_entropy else n
    layout = image_layout(model, split.x_train)
    for i, index in enumerate(data.batches(n, budget.batch_size, loop.rng)):
        index = index.to(device)
        x, y = split.x_train.index_select(0, index), split.y_train.index_select(0, index)
        if budget.augment.crop or budget.augment.flip:
            x = data.augment(x, loop.rng, crop=budget.augment.crop, flip=budget.augment.flip)
        x = laid_out(x, layout)
        step = (number - 1) * steps + i
        _set_rates(loop, step)
        try:
            figures.append(take_step(loop, parameters, x, y, size))
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise InputError(
                f"batch norm has no variance over a batch of 1 sample, and batch_size="
                f"{budget.batch_size} leaves one of {n}; choose another batch_size"
            ) from None
        _stepped(loop, step, number, steps)
    optimizers.switch(optimizer, training=False)
    loss, accuracy, norm = means(figures, budget.batch_size)
    return _figures(loop, number, loss, accuracy, norm)


def _validation(loop: Loop) -> dict[str, float]:
    model, split = loop.measured, loop.split
    if isinstance(split, Streams):
        device = next(model.parameters()).device
        at = Landscape(model, split.val, objective=loop.objective, device=device)
    else:
        at = Landscape(model, split.x_val, split.y_val, loop.loss)
    evaluation = at.evaluate(flatten(model))
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


def final_metrics(held_out: Landscape, training: Landscape) -> dict[str, Metric]:
    """Loss of a network on both whole splits, in evaluation mode, and accuracy where it has one."""
    metrics = {}
    for name, landscape in (("val", held_out), ("train", training)):
        at = landscape.evaluate(landscape.theta)
        metrics[f"{name}_loss"] = Metric(at.loss, errors={"data": at.loss_error})
        if not math.isnan(at.error):
            metrics[f"{name}_accuracy"] = Metric(1 - at.error, errors={"data": at.error_error})
    return metrics
