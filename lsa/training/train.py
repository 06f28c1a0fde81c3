"""The training loop: a generator that yields after every epoch, so whoever drives it may log, save
or stop. Nothing here knows about tracking or files."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsa.landscape import Landscape, flatten, noise_scale
from lsa.landscape.derivatives import batch_norm
from lsa.landscape.derivatives.budget import cache_size, image_layout, laid_out
from lsa.probe import Report
from lsa.project import Recipe
from lsa.runtime.errors import InputError
from lsa.training import data, models, optimizers
from lsa.training.data import Data


class Diverged(ArithmeticError):
    """Training left the finite numbers; the message says when and what to do."""


@dataclass(frozen=True)
class Epoch:
    """One finished epoch: its number (from 1), what was measured, and the state to go on from."""

    number: int
    metrics: Mapping[str, float]
    state: Mapping[str, Any]  # storable by `lsa.tracking.serial`; `train` goes on from it


def network(recipe: Recipe, split: Data, trusted: Collection[str] = ()) -> nn.Module:
    """The recipe's network with its initial weights, on the CPU."""
    return models.build(
        recipe.model.name,
        input_shape=tuple(split.x_train.shape[1:]),
        classes=split.classes,
        seed=recipe.seed,
        trusted=trusted,
        **recipe.model.options,
    )


def initial(recipe: Recipe, split: Data, trusted: Collection[str] = ()) -> dict[str, Any]:
    """Epoch, weights and optimizer state before the first step, as `Epoch.state` names them.

    The learning rate is that of the first step; in `Epoch.state` it is that of the last.
    """
    model = network(recipe, split, trusted)
    rule = recipe.rule
    optimizer = optimizers.build(rule.name, model.parameters(), trusted=trusted, **rule.options)
    for group in optimizer.param_groups:
        group["lr"] *= _schedule(recipe, split)(0)
    return {"epoch": 0, "model": model.state_dict(), "optimizer": optimizer.state_dict()}


def train(
    recipe: Recipe,
    split: Data,
    *,
    trusted: Collection[str] = (),
    state: Mapping[str, Any] | None = None,
    report: Report | None = None,
) -> Iterator[Epoch]:
    """Train by the recipe, yielding every finished epoch.

    Initial weights, batch order and augmentation follow from the recipe's seed alone, so two runs
    on one machine and thread count agree bit for bit, also when one was interrupted and went on
    from a yielded state. On a GPU they agree only as far as its kernels do, which add in any order.

    Args:
        recipe: Model, optimizer, schedule and budget.
        split: Data on the device that shall compute.
        trusted: Packages whose factories may be imported.
        state: An earlier `Epoch.state`; training continues after it.
        report: Told the number of finished batches.

    Raises:
        InputError: The recipe names something that does not exist or does not fit.
        Diverged: A loss is not finite.
    """
    device = split.x_train.device
    model = network(recipe, split, trusted).to(device)
    rule = recipe.rule
    optimizer = optimizers.build(rule.name, model.parameters(), trusted=trusted, **rule.options)
    rng = torch.Generator().manual_seed(recipe.seed)
    first = 1
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        rng.set_state(state["rng"])
        first = state["epoch"] + 1
    factor = _schedule(recipe, split)
    base = [group["lr"] for group in optimizer.param_groups]
    if state is not None:
        base = list(state["base_lr"])
    for number in range(first, recipe.train.epochs + 1):
        started = time.perf_counter()
        metrics = _epoch(recipe, split, model, optimizer, rng, factor, base, number, report)
        metrics["train/seconds"] = time.perf_counter() - started
        metrics |= _validation(model, split)
        if recipe.train.noise_scale:
            metrics |= _noise(model, split, number)
        yield Epoch(
            number,
            metrics,
            {
                "epoch": number,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "rng": rng.get_state(),
                "base_lr": base,
            },
        )


def _schedule(recipe: Recipe, split: Data) -> Callable[[int], float]:
    """Factor of the learning rate at each step."""
    return optimizers.schedule(
        recipe.train.schedule.name,
        epochs=recipe.train.epochs,
        steps_per_epoch=-(-len(split.x_train) // recipe.train.batch_size),
        **recipe.train.schedule.options,
    )


def _epoch(
    recipe: Recipe,
    split: Data,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rng: torch.Generator,
    factor: Callable[[int], float],
    base: list[float],
    number: int,
    report: Report | None,
) -> dict[str, float]:
    """One pass over the training split; means of loss, accuracy and gradient norm over it."""
    model.train()
    optimizers.switch(optimizer, training=True)
    n, device = len(split.x_train), split.x_train.device
    budget = recipe.train
    steps = -(-n // budget.batch_size)
    found: list[tuple[Tensor, list[Tensor]]] = []  # of every step, what `_step` returns
    parameters = [p for p in model.parameters() if p.requires_grad]
    size = _pass_size(model, split.x_train)
    layout = image_layout(model, split.x_train)
    for i, index in enumerate(data.batches(n, budget.batch_size, rng)):
        index = index.to(device)
        x, y = split.x_train.index_select(0, index), split.y_train.index_select(0, index)
        if budget.augment.crop or budget.augment.flip:
            x = data.augment(x, rng, crop=budget.augment.crop, flip=budget.augment.flip)
        x = laid_out(x, layout)
        step = (number - 1) * steps + i
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * factor(step)
        found.append(_step(model, optimizer, parameters, x, y, size))
        if report is not None:
            report(step + 1, budget.epochs * steps, f"epoch {number}/{budget.epochs}")
    optimizers.switch(optimizer, training=False)
    loss, accuracy, norm = _means(found, budget.batch_size)
    if not math.isfinite(loss + norm):
        raise Diverged(
            f"training of {recipe.optimizer} diverged in epoch {number} (loss {loss:.3g}); "
            f"lower its learning rate (now {base[0]:g})"
        )
    return {
        "train/loss": loss,
        "train/accuracy": accuracy,
        "train/gradient_norm": norm,
        "train/weight_norm": flatten(model).double().norm().item(),
        "train/learning_rate": optimizer.param_groups[0]["lr"],
    }


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    x: Tensor,
    y: Tensor,
    size: int,
) -> tuple[Tensor, list[Tensor]]:
    """One optimizer step in passes of a size.

    To sum and to count is left to the epoch's end: once in a step, an operation on a few numbers
    takes a quarter of a percent of an mlp's.

    Returns:
        At the first evaluation the mean loss, followed by squared norms of parts of the gradient,
        one or more; and of each sample, pass by pass, whether it is correct.

    Raises:
        InputError: The optimizer evaluates nothing.
    """
    first: list[tuple[Tensor, list[Tensor]]] = []

    def closure() -> Any:
        optimizer.zero_grad()
        losses, correct = [], []
        for inputs, targets in _passes(x, y, size):
            outputs = model(inputs)
            loss = F.cross_entropy(outputs, targets)
            if len(inputs) < len(x):
                loss = loss * (len(inputs) / len(x))
            loss.backward()
            losses.append(loss.detach())
            correct.append(outputs.detach().argmax(1) == targets)
        loss = reduce(torch.add, losses)
        if not first:  # SAM and LBFGS evaluate again elsewhere
            gradients = [p.grad for p in parameters if p.grad is not None]
            figures = torch.stack([loss, *_squared_norms(gradients)])
            first.append((figures, correct))
        return loss

    optimizer.step(closure)
    if not first:
        raise InputError(
            f"{type(optimizer).__name__}.step does not call the closure that it is given, so there "
            "is no gradient; let it do so first, as those of torch.optim do"
        )
    return first[0]


def _means(found: Iterable[tuple[Tensor, list[Tensor]]], batch_size: int) -> list[float]:
    """Loss, accuracy and gradient norm, means over the samples, of what `_step` has returned."""
    figures, correct = zip(*found, strict=True)
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
    whole = x.device.type != "cpu" or batch_norm.layers(model)
    return len(x) if whole else cache_size(model, x)


def _validation(model: nn.Module, split: Data) -> dict[str, float]:
    found = Landscape(model, split.x_val, split.y_val).evaluate(flatten(model))
    return {"val/loss": found.loss, "val/accuracy": 1 - found.error}


def _noise(model: nn.Module, split: Data, number: int) -> dict[str, float]:
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
    first = Landscape(model, *batches[0])
    landscapes = (first.with_data(x, y) for x, y in batches)
    found = noise_scale.of_batches(landscapes, flatten(model), n)
    named = {
        "train/noise_trace": found.trace,
        "train/gradient_squared": found.gradient_squared,
        "train/noise_scale": found.scale,
        "train/gradient_diversity": found.diversity,
    }
    values = {name: estimate.value for name, estimate in named.items()}
    values |= {f"{name}_se_data": estimate.error for name, estimate in named.items()}
    # Where noise hides the gradient there is no noise scale, and no point in its curve.
    return {name: value for name, value in values.items() if math.isfinite(value)}


def final_metrics(model: nn.Module, split: Data) -> dict[str, float]:
    """Loss and accuracy of a network on both whole splits, in evaluation mode."""
    found = {}
    theta = flatten(model)
    for name, x, y in (
        ("val", split.x_val, split.y_val),
        ("train", split.x_train, split.y_train),
    ):
        evaluation = Landscape(model, x, y).evaluate(theta)
        found[f"final/{name}_accuracy"] = 1 - evaluation.error
        found[f"final/{name}_accuracy_se_data"] = evaluation.error_error
        found[f"final/{name}_loss"] = evaluation.loss
        found[f"final/{name}_loss_se_data"] = evaluation.loss_error
    return found
