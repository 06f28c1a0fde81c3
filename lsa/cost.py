"""What a step will cost on this machine, from a gradient measured here and now."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from lsa.derivatives import budget
from lsa.landscape import Landscape, flatten
from lsa.memory.checkpoint import load_data
from lsa.probe import Probe, Sizes
from lsa.project import Project, Recipe
from lsa.training.train import network

SAMPLES = 256  # on which the rates are measured
STEP = 2.0  # seconds of a step beside its arithmetic: checkpoint, logging, figure
LONG = 1.0  # seconds of measuring after which one more is not worth it
BYTES = 4  # of a number in float32
OPERATORS = 2  # whose graphs a probe may keep at once: H and G, or H and C
SPARE = 1.5  # times what the first of them may hold: the second finds half as much free


@dataclass(frozen=True)
class Rates:
    """Seconds per sample of the six things that everything here is made of."""

    loss: float
    gradient: float
    product: float  # Hessian times vector
    gauss_newton: float  # Gauss–Newton matrix times vector
    covariance: float  # covariance times vector
    curvature: float  # its own, along a vector
    memory: int  # bytes of this process with the data and a gradient
    sizes: Sizes
    graphs: float = 0.0  # bytes per sample that a product keeps for the next
    spare: int = 0  # bytes that one operator's graphs may hold


@dataclass(frozen=True)
class Cost:
    """An estimate, not a promise: how long Lanczos takes depends on the spectrum."""

    seconds: float
    memory: int  # bytes of the process at its peak
    spread: tuple[float, float] = (1.0, 1.0)  # factors of the time, as the checkpoint may be


def rates(
    setting: Project,
    recipe: Recipe,
    device: str,
    trusted: tuple[str, ...] = (),
    workers: int = 1,
) -> Rates:
    """Measure loss, gradient and Hessian product at the initial weights of a recipe's network."""
    split = load_data(recipe, device)
    model = network(recipe, split, trusted).to(device)
    wanted, training = setting.landscape.samples, len(split.x_train)
    samples = training if wanted == "all" else min(wanted, training)
    landscape = Landscape(model, split.x_train[:samples], split.y_train[:samples])
    return measured(landscape, flatten(model), training, len(split.x_val), workers)


def measured(
    landscape: Landscape,
    theta: Tensor,
    training: int,
    validation: int,
    workers: int = 1,
    optimizer: str = "",
) -> Rates:
    """Measure them on a part of a landscape.

    Args:
        landscape: On all samples that a probe will see.
        theta: Where.
        training: Samples of the whole training split.
        validation: Samples of the held-out split.
        workers: Processes that will share cores and memory.
        optimizer: That trained the checkpoint.
    """
    samples, spare = landscape.n_samples, budget.fixed_memory()
    if spare is None:
        spare = budget.graph_memory(theta.device) // workers
    names = tuple(landscape.unflatten(theta))
    sizes = Sizes(len(theta), samples, training, validation, names, optimizer)
    n = min(SAMPLES, samples)
    graphs = landscape.graph_size(theta)
    # As many of the graphs must fit here as will fit there, since a kept one makes a product cheap.
    x, y = landscape.x[:n], landscape.y[:n]
    memory = int(spare * n / samples)
    part = Landscape(landscape.model, x, y, landscape.loss_function, memory=memory)
    v = torch.randn(len(theta), generator=torch.Generator().manual_seed(0)).to(theta)
    operators = part.hessian(theta), part.gauss_newton(theta), part.covariance(theta, centred=False)
    loss = _time(lambda: part.loss(theta)) / n
    gradient = _time(lambda: part.gradient(theta)[0].item()) / n
    resident = psutil.Process().memory_info().rss
    product, gauss_newton, covariance = (
        _time(lambda matvec=matvec: matvec(v)[0].item()) / n for matvec in operators
    )
    curvature = _time(lambda: part.curvatures(theta, v)[0].item()) / n
    return Rates(
        loss, gradient, product, gauss_newton, covariance, curvature, resident, sizes, graphs, spare
    )


def _time(work: Callable[[], Any]) -> float:
    """Seconds of the fastest of some runs, after one that warms up and may import much."""
    work()
    took: list[float] = []
    while not took or (len(took) < 5 and sum(took) < LONG):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return min(took)


def training(recipe: Recipe, measured: Rates) -> Cost:
    """Of a training run: a gradient of every sample per epoch, and the validation split."""
    at = measured.sizes
    epoch = at.training * measured.gradient + at.validation * measured.loss
    final = at.training * measured.loss
    return Cost(STEP + recipe.train.epochs * epoch + final, measured.memory)


def probing(declared: Probe, options: Mapping[str, Any], measured: Rates) -> Cost | None:
    """Of a probe; None when it does not declare its work."""
    if declared.work is None:
        return None
    work = declared.work(measured.sizes, **options)
    seconds = (
        work.losses * measured.loss
        + work.gradients * measured.gradient
        + work.products * measured.product
        + work.gauss_newton * measured.gauss_newton
        + work.covariance * measured.covariance
        + work.curvatures * measured.curvature
    )
    memory = measured.memory + work.vectors * measured.sizes.dimension * BYTES
    if work.products or work.gauss_newton or work.covariance:
        kept = measured.graphs * measured.sizes.samples
        memory += int(min(OPERATORS * kept, SPARE * measured.spare))
    return Cost(STEP + seconds, memory, work.spread)
