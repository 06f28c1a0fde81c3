"""What a step will cost on this machine, from a gradient measured here and now."""

from __future__ import annotations

import dataclasses
import mmap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.func import grad, vmap

from lsa.landscape import Landscape, consistency, flatten
from lsa.landscape.blocks import blocks, parted
from lsa.landscape.derivatives import budget
from lsa.landscape.samples import Samples
from lsa.maths.alignment.permutations import permutation_spec
from lsa.maths.spectra.krylov import Matvec, orthogonalise
from lsa.probe import Probe, Sizes, Work
from lsa.project import Project, Recipe
from lsa.runtime.errors import InputError
from lsa.tracking.checkpoint import load_data
from lsa.training.recipes import held_out, landscape_of, network

SAMPLES = 256  # on which the rates are measured
STEP = 2.0  # seconds of a step beside its arithmetic: checkpoint, logging, figure
ROUNDS = 5  # of measuring at most
LONG = 4.0  # seconds of all after which one more is not worth it; of one, before the first counts
ROW = 1 << 22  # numbers of a vector on which the rate of a row is measured
# The check before a probe: losses and a gradient; then in float64, beside a product, gradients of a
# few samples, slopes, which take as long as one, and of a batch those of its total and its samples.
# Then what float64 costs. It holds six vectors: θ, direction, product, two gradients and what one
# more needs. Sums of such vectors take as long as so many rows of a basis. As seen for transformers
# of 0.8, 10.7 and 124 million parameters.
CHECKED, COMPARED, ADDED, DOUBLE, CHECK_VECTORS, CHECK_ROWS = 3, 3, 2, 1.9, 6, 14
NEW = 1 << 28  # bytes on which the rate of new memory is measured
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
    row: float = 0.0  # seconds to make a vector orthogonal to one of a basis
    check: float = 0.0  # seconds of the check before a probe
    before: int = 0  # bytes of the process before the first gradient
    new: float = 0.0  # seconds per byte of memory that the process has not had before


@dataclass(frozen=True)
class Cost:
    """An estimate, not a promise: how long Lanczos takes depends on the spectrum."""

    seconds: float
    memory: int  # bytes of the process at its peak
    least: float = 0.0  # seconds at a kinder checkpoint, and at a harder one; 0: the same
    most: float = 0.0


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
    clock: Callable[[], float] = time.perf_counter,
) -> Rates:
    """Measure the rates on a part of a landscape, with the current number of threads.

    Args:
        landscape: On all samples that a probe will see.
        theta: θ `(d,)`.
        training: Samples of the whole training split.
        validation: Samples of the held-out split.
        workers: Processes that will share cores and memory.
        optimizer: That trained the checkpoint.
        clock: Of the seconds; `time.process_time` leaves out what others take on the machine.
    """
    before, new = psutil.Process().memory_info().rss, _new(clock)
    samples, spare = landscape.n_samples, landscape.graph_memory
    if landscape.memory is None:
        spare //= workers
    n = min(SAMPLES, samples)
    graphs = landscape.graph_size(theta)
    sizes = dataclasses.replace(
        _sizes(landscape, theta, graphs * samples <= spare),
        training=training,
        validation=validation,
        optimizer=optimizer,
    )
    # As many of the graphs must fit here as will fit there, since a kept one makes a product cheap.
    part = landscape.subset(torch.arange(n)).with_memory(int(spare * n / samples))
    v = torch.randn(len(theta), generator=torch.Generator().manual_seed(0)).to(theta)
    rows = torch.stack([v[:ROW]] * 4) / len(theta) ** 0.5
    product = part.hessian(theta)
    gauss_newton_product = _unless_refused(part.gauss_newton(theta), product)
    operators = product, gauss_newton_product, part.covariance(theta, centred=False)
    firsts: list[Callable[[], Any]] = [
        lambda: part.loss(theta),
        lambda: part.gradient(theta)[0].item(),
    ]
    vmap(grad(torch.sin))(v[:1])  # loads what a probe will need of torch
    for first in firsts:
        first()
    resident = psutil.Process().memory_info().rss
    # A first product builds the graphs that are kept, or looks for the step of its differences,
    # for which it takes ten to twelve gradients, and later ones two.
    for operator in operators if sizes.kept else operators[:1]:
        operator(v)
    seconds = _seconds(
        [
            *firsts,
            *(lambda matvec=matvec: matvec(v)[0].item() for matvec in operators),
            lambda: part.curvatures(theta, v)[0].item(),
            lambda: orthogonalise(v[:ROW], rows)[1][0].item(),
        ],
        clock,
    )
    loss, gradient, hessian, gauss_newton, covariance, curvature = (s / n for s in seconds[:-1])
    row = seconds[-1] / len(rows) * len(theta) / rows.shape[1]
    return Rates(
        loss,
        gradient,
        hessian,
        gauss_newton,
        covariance,
        curvature,
        resident,
        sizes,
        graphs,
        spare,
        _pass(landscape),
        row,
        _check(landscape, loss, gradient, hessian, row) if budget.settings().check else 0.0,
        before,
        new,
    )


def _unless_refused(first: Matvec, other: Matvec) -> Matvec:
    """The first product; the other where it is refused, as probes then leave it out."""
    taken: list[Matvec] = []

    def product(v: Tensor) -> Tensor:
        if not taken:
            try:
                result = first(v)
            except InputError:
                taken.append(other)
            else:
                taken.append(first)
                return result
        return taken[0](v)

    return product


def _new(clock: Callable[[], float]) -> float:
    """Seconds per byte of new memory, which the kernel clears page by page as it is written to."""
    with mmap.mmap(-1, NEW) as block:
        began = clock()
        for page in range(0, NEW, mmap.PAGESIZE):
            block[page] = 1
        return (clock() - began) / NEW


def _sizes(landscape: Landscape, theta: Tensor, kept: bool) -> Sizes:
    """What a landscape alone says; the graphs of products are kept, or are not."""
    names = tuple(landscape.unflatten(theta))
    symmetric, named = _symmetric(landscape, names), blocks(names, 0)
    return Sizes(
        len(theta),
        landscape.n_samples,
        0,
        0,
        names,
        symmetric=symmetric,
        apart=len(parted(landscape, theta, named)) - len(named) if symmetric else 0,
        kept=kept,
        basis=budget.vectors(theta) * theta.nbytes,
    )


def _symmetric(landscape: Landscape, names: Sequence[str]) -> float:
    """Parts of a transformer whose symmetries are tried, about: a third of its layers."""
    try:
        permutation_spec(landscape.model)
    except InputError:
        return len(blocks(names, 0)) / 3
    return 0.0


def _pass(landscape: Landscape) -> int:
    """Samples in a pass; of batches in the largest."""
    if isinstance(landscape.data, Samples):
        return min(landscape.chunk, landscape.n_samples)
    return max(count.units for count in landscape.data.batches.counts)


def _check(landscape: Landscape, loss: float, gradient: float, product: float, row: float) -> float:
    """Seconds of the check before a probe, from those of its parts per sample."""
    n, batch = min(landscape.n_samples, consistency.DERIVED), 0
    if not isinstance(landscape.data, Samples):
        batch = _pass(landscape)  # is computed as a whole
        n = max(n, batch)
    each = COMPARED * gradient + (product if landscape.products != "gradients" else 0.0)
    single = n * (CHECKED * loss + gradient) + CHECK_ROWS * row
    return single + DOUBLE * (n * each + batch * ADDED * gradient)


def _seconds(
    works: Sequence[Callable[[], Any]], clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Median seconds of each task over several rounds, after one that warms up.

    In turn, so that a spell in which the machine is slow does not fall on one of them alone. The
    probe will meet such spells as well: with the least of the rounds, what was said was on average
    a tenth below what it took. A task that takes long is called once. Of a short one the first call
    says nothing, since the memory that it needs is new then: for a row of a basis, of which a
    search takes hundreds, it took eight times as long as the second.
    """

    def took(work: Callable[[], Any]) -> float:
        before = clock()
        work()
        return clock() - before

    first = [took(work) for work in works]
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(ROUNDS):
        for work, once, taken in zip(works, first, seconds, strict=True):
            if once <= LONG and sum(taken) <= LONG / len(works):
                taken.append(took(work))
    return [median(taken or [once]) for once, taken in zip(first, seconds, strict=True)]


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
    kinds, memory = (work.least or work, work, work.most or work), _held(work, measured)
    fixed = STEP + measured.check + measured.new * max(0, memory - measured.before)
    least, usual, most = (fixed + _worked(kind, measured) for kind in kinds)
    return Cost(usual, memory, least, most)


def _worked(work: Work, measured: Rates) -> float:
    """Seconds of some work."""
    return (
        work.losses * measured.loss
        + work.gradients * measured.gradient
        + work.products * measured.product
        + work.gauss_newton * measured.gauss_newton
        + work.covariance * measured.covariance
        + work.curvatures * measured.curvature
        + work.rows * measured.row
    )


def _held(work: Work, measured: Rates) -> int:
    """Bytes of the process at the peak of some work."""
    vectors = work.vectors * measured.sizes.dimension * work.width
    if work.products or work.gauss_newton or work.covariance:
        graphs = measured.graphs * work.width / BYTES
        kept = min(OPERATORS * graphs * measured.sizes.samples, SPARE * measured.spare)
        vectors += int(kept + graphs * measured.chunk)  # and that of a pass in the making
    check = int(CHECK_VECTORS * measured.sizes.dimension + measured.graphs / BYTES) * 8
    return measured.memory + max(vectors, check if measured.check else 0)
