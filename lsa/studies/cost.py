"""What a step will cost on this machine, from a gradient measured here and now."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor

from lsa.landscape import Landscape, flatten
from lsa.landscape.derivatives import budget
from lsa.probe import Probe, Sizes
from lsa.project import Project, Recipe
from lsa.tracking.checkpoint import load_data
from lsa.training.recipes import held_out, landscape_of, network

SAMPLES = 256  # on which the rates are measured
STEP = 2.0  # seconds of a step beside its arithmetic: checkpoint, logging, figure
ROUNDS = 5  # of measuring at most
LONG = 4.0  # seconds of them after which one more is not worth it
BYTES = 4  # of a number, as all is measured in float32
OPERATORS = 2  # whose graphs a probe may keep at once: H and G, or H and C
SPARE = 1.5  # times what the first of them may hold: the second finds half as much free


@dataclass(frozen=True)
class Rates:
    """Seconds per sample of the six computations that every step consists of."""

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
    chunk: int = 0  # samples in a pass


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
    """Seconds and bytes of a loss, a gradient and a Hessian product at a recipe's initial weights.

    Args:
        setting: The project, which says how many samples probes see.
        recipe: Of the network and its data.
        device: Where to measure.
        trusted: Packages whose factories may be imported.
        workers: Processes that will share cores and memory.
    """
    budget.from_environment()
    split = load_data(recipe, device, trusted)
    model = network(recipe, split, trusted).to(device)
    full, wanted = landscape_of(recipe, split, model, trusted), setting.landscape.samples
    training = full.n_samples
    samples = training if wanted == "all" else min(wanted, training)
    landscape = full.subset(torch.arange(samples)) if samples < training else full
    validation = held_out(full, split).n_samples
    return measured(landscape, flatten(model), training, validation, workers)


def measured(
    landscape: Landscape,
    theta: Tensor,
    training: int,
    validation: int,
    workers: int = 1,
    optimizer: str = "",
) -> Rates:
    """Measure the rates on a part of a landscape, with the current number of threads.

    Args:
        landscape: On all samples that a probe will see.
        theta: θ `(d,)`.
        training: Samples of the whole training split.
        validation: Samples of the held-out split.
        workers: Processes that will share cores and memory.
        optimizer: That trained the checkpoint.
    """
    samples, spare = landscape.n_samples, budget.settings().memory
    if spare is None:
        spare = budget.graph_memory(theta.device) // workers
    names = tuple(landscape.unflatten(theta))
    sizes = Sizes(len(theta), samples, training, validation, names, optimizer)
    n = min(SAMPLES, samples)
    graphs = landscape.graph_size(theta)
    # As many of the graphs must fit here as will fit there, since a kept one makes a product cheap.
    part = landscape.subset(torch.arange(n)).with_memory(int(spare * n / samples))
    v = torch.randn(len(theta), generator=torch.Generator().manual_seed(0)).to(theta)
    operators = part.hessian(theta), part.gauss_newton(theta), part.covariance(theta, centred=False)
    firsts: list[Callable[[], Any]] = [
        lambda: part.loss(theta),
        lambda: part.gradient(theta)[0].item(),
    ]
    for first in firsts:
        first()
    resident = psutil.Process().memory_info().rss
    seconds = _seconds(
        [
            *firsts,
            *(lambda matvec=matvec: matvec(v)[0].item() for matvec in operators),
            lambda: part.curvatures(theta, v)[0].item(),
        ]
    )
    loss, gradient, product, gauss_newton, covariance, curvature = (s / n for s in seconds)
    return Rates(
        loss,
        gradient,
        product,
        gauss_newton,
        covariance,
        curvature,
        resident,
        sizes,
        graphs,
        spare,
        min(landscape.chunk, samples),
    )


def _seconds(works: Sequence[Callable[[], Any]]) -> list[float]:
    """Median seconds of each task over several rounds, after one round that warms up.

    In turn, so that a spell in which the machine is slow does not fall on one of them alone. The
    probe will meet such spells as well: with the least of the rounds, what was said was on average
    a tenth below what it took.
    """
    for work in works:
        work()
    seconds: list[list[float]] = [[] for _ in works]
    begun = time.perf_counter()
    for _ in range(ROUNDS):
        for work, taken in zip(works, seconds, strict=True):
            before = time.perf_counter()
            work()
            taken.append(time.perf_counter() - before)
        if time.perf_counter() - begun > LONG:
            break
    return [median(taken) for taken in seconds]


def training(recipe: Recipe, measured: Rates) -> Cost:
    """Cost of a training: per epoch a gradient of every sample, and the validation loss."""
    at = measured.sizes
    epoch = at.training * measured.gradient + at.validation * measured.loss
    final = at.training * measured.loss
    return Cost(STEP + recipe.train.epochs * epoch + final, measured.memory)


def probing(declared: Probe, options: Mapping[str, Any], measured: Rates) -> Cost | None:
    """Cost of a probe in seconds and bytes; None if the probe does not declare its work.

    Args:
        declared: The probe.
        options: All of its options, resolved.
        measured: Seconds per unit of work, from `measured` or `rates`.
    """
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
    memory = measured.memory + work.vectors * measured.sizes.dimension * work.width
    if work.products or work.gauss_newton or work.covariance:
        graphs = measured.graphs * work.width / BYTES
        kept = min(OPERATORS * graphs * measured.sizes.samples, SPARE * measured.spare)
        memory += int(kept + graphs * measured.chunk)  # and that of a pass in the making
    return Cost(STEP + seconds, memory, work.spread)
