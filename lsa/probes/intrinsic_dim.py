"""How many random directions suffice to train the network."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from lsa.landscape import Landscape
from lsa.landscape.subspace_training import Budget, SubspaceTrainer, Trained
from lsa.maths.crossing import Crossing, crossing, isotonic, search
from lsa.probe import Curve, Metric, Report, Result, Sizes, Work, between, probe
from lsa.runtime.errors import InputError

SMALLEST, RATIO = 8, 4  # the grid of dimensions: 8, 32, 128, … (tuned here)
FEWEST = 3  # dimensions of a search that the first of the grid ends: it, the next, and 1
FALL = 0.05  # of the mean accuracy towards larger d that no chance explains (tuned here)


def _work(
    at: Sizes, *, d: int, subspaces: int, epochs: int, largest: int, tolerance: float, **_: Any
) -> Work:
    """The work of the most trainings that a search makes."""
    largest = min(largest, at.dimension)
    sizes = 1 if d else _most_dimensions(largest, tolerance)
    fewest = 1 if d else min(FEWEST, len(_grid(largest)))

    def of(tried: int) -> Work:
        trainings = tried * subspaces
        return Work(
            losses=trainings * at.validation,
            gradients=float(trainings * epochs * at.training),
            vectors=8,
        )

    return between(of, (fewest, sizes, sizes))


@probe(
    headline=("d90", "accuracy_at_d"),
    work=_work,
    caption="Accuracy when only d random directions are trained; dashed, the accuracy that "
    "counts as enough. Optimizers that start at the same weights share the curve and "
    "differ in the dashed line alone, so this is the network's dimension and not the "
    "optimizer's.",
)
def intrinsic_dim(
    training: Landscape,
    validation: Landscape,
    theta: Tensor,
    theta_init: Tensor,
    rng: torch.Generator,
    report: Report,
    *,
    d: Annotated[int, "train at this dimension only; 0: search for d90", Field(ge=0)] = 0,
    share: Annotated[float, "of the baseline accuracy to be reached", Field(gt=0, le=1)] = 0.9,
    baseline: Annotated[
        float, "global baseline accuracy; 0: the checkpoint's own (local)", Field(ge=0, le=1)
    ] = 0.0,
    subspaces: Annotated[int, "random subspaces per dimension", Field(ge=1)] = 3,
    epochs: Annotated[int, "of each training", Field(ge=1)] = 10,
    batch_size: Annotated[int, "of each training", Field(ge=1)] = 64,
    lr: Annotated[
        float, "Adam's highest rate in the whole space; × √(D/d) in a subspace", Field(gt=0)
    ] = 0.005,
    largest: Annotated[int, "dimension at which the search gives up", Field(ge=1)] = 10_000,
    tolerance: Annotated[
        float, "bisect until the bracket is narrower than this times d", Field(ge=0)
    ] = 0.2,
    kind: Annotated[Literal["fastfood", "sparse", "dense"], "random projection"] = "fastfood",
) -> Result:
    """Intrinsic dimension: how many random directions training needs for 90 % of an accuracy.

    The network is trained from θ₀ in random affine subspaces θ₀ + P z (Li, Farkhoor, Liu &
    Yosinski 2018, arXiv 1804.08838), for d = 8, 32, 128, … until the accuracy passes the threshold,
    and at bisections. The accuracies are made monotone in d. d90 is the d at which they reach
    `share` × baseline, with a 95 % t interval over the subspaces (`lsa.maths.crossing`). The local
    baseline is the checkpoint's validation accuracy. Beside it only the checkpoint's initial
    weights matter: checkpoints that started alike have the same accuracies at every d.

    Training is Adam at a rate that rises and falls (`lsa.landscape.subspace_training`). The
    accuracy after the last epoch counts, as it does for the checkpoint. Li et al. train for 100
    epochs at a constant rate and count the best epoch, which is biased upwards. Fewer epochs give a
    larger d90.
    Cost: number of d (4 or 5 on the grid and about 3 more) × subspaces × epochs of training.
    """
    D = training.dimension
    _check_threshold(D, d, share, baseline)
    local = _local_baseline(validation, theta)
    reference = baseline or local.value
    threshold = share * reference
    largest = min(largest, D)
    budget = Budget(epochs, batch_size, lr)
    trainer = SubspaceTrainer(training, validation, theta_init, kind, budget)
    seeds = torch.randint(2**62, (subspaces,), generator=rng).tolist()
    trainings = _Trainings(trainer, seeds, 1 if d else _most_dimensions(largest, tolerance), report)
    if d:
        accuracies = torch.tensor([trainings.accuracies(d)], dtype=torch.float64).T
        tried = torch.tensor([d])
    else:
        grid = {"smallest": SMALLEST, "ratio": RATIO, "tolerance": tolerance}
        tried, accuracies = search(trainings.accuracies, threshold, largest, **grid)
    start = trainer.accuracy(theta_init)
    metrics = {
        "baseline_local": local,
        **({"baseline_global": Metric(baseline)} if baseline else {}),
        "threshold": Metric(threshold),
        "accuracy_at_start": Metric(start),
        "trainings": Metric(accuracies.numel()),
        "parameters": Metric(D),
    }
    notes = _notes(baseline, local.value, share, start, trainings.of)
    if d:
        metrics = _at_d(accuracies[:, 0], validation.n_samples, reference) | metrics
        arrays = _arrays(tried, accuracies, trainer, trainings.of[d])
        return Result(metrics, arrays=arrays, notes=notes)
    limit = crossing(tried, accuracies, threshold)
    at = next((size for size in tried.tolist() if size >= limit.dimension), int(tried[-1]))
    return Result(
        _at_crossing(limit, D) | metrics,
        {"accuracy": _curve(tried, accuracies, largest)},
        _arrays(tried, accuracies, trainer, trainings.of[at]),
        converged=math.isfinite(limit.dimension),
        notes=(*notes, *limit.notes, *_falling(tried, accuracies)),
    )


class _Trainings:
    """The trainings of a search: at every dimension that is tried, one in each random subspace."""

    def __init__(
        self, trainer: SubspaceTrainer, seeds: list[int], dimensions: int, report: Report
    ) -> None:
        self.trainer, self.seeds, self.report = trainer, seeds, report
        self.expected = dimensions * len(seeds)
        self.of: dict[int, list[Trained]] = {}

    def accuracies(self, d: int) -> list[float]:
        """Train at dimension d; the accuracy in every subspace."""
        before, runs = len(self.of) * len(self.seeds), []
        self.of[d] = runs
        for j, seed in enumerate(self.seeds):
            text = f"d={d}, subspace {j + 1}/{len(self.seeds)}"
            part = _part(self.report, before + j, self.expected, text)
            # The seed of d and j is the same in every search, and so is the training.
            runs.append(self.trainer.train(d, seed + d, part))
        return [run.accuracy for run in runs]


def _local_baseline(validation: Landscape, theta: Tensor) -> Metric:
    """The checkpoint's own accuracy."""
    own = validation.evaluate(theta)
    if math.isnan(own.error):
        raise InputError("the targets are not classes, so there is no accuracy; use a classifier")
    return Metric(1 - own.error, errors={"data": own.error_error})


def _at_d(accuracies: Tensor, samples: int, reference: float) -> dict[str, Metric]:
    """The accuracy at a given dimension, and its share of the baseline."""
    accuracy = _accuracy(accuracies, samples)
    share = accuracy.value / reference if reference else math.nan
    return {"accuracy_at_d": accuracy, "share_of_baseline": Metric(share)}


def _at_crossing(limit: Crossing, D: int) -> dict[str, Metric]:
    """The dimension at which the threshold is reached, with its interval."""
    return {
        "d90": Metric(limit.dimension),
        "d90_low": Metric(limit.low),
        "d90_high": Metric(limit.high),
        "d90_share": Metric(limit.dimension / D),
    }


def _check_threshold(D: int, d: int, share: float, baseline: float) -> None:
    if not 0 <= d <= D:
        raise InputError(f"d={d} is outside 1…{D}, the number of parameters; 0 searches for d90")
    if not 0 < share <= 1:
        raise InputError(f"share={share:g} is outside (0, 1]; the usual share is 0.9")
    if not 0 <= baseline <= 1:
        raise InputError(
            f"baseline={baseline:g} is no accuracy; give one in (0, 1], or 0 for local"
        )


def _grid(largest: int) -> list[int]:
    """The dimensions that every search climbs, as far as it must."""
    sizes = [min(SMALLEST, largest)]
    while sizes[-1] < largest:
        sizes.append(min(largest, sizes[-1] * RATIO))
    return sizes


def _most_dimensions(largest: int, tolerance: float) -> int:
    """About how many dimensions a search tries at most, for the progress bar."""
    narrow = max(math.log1p(tolerance), 1 / largest)
    return len(_grid(largest)) + max(0, math.ceil(math.log2(math.log(RATIO) / narrow)))


def _part(report: Report, before: int, expected: int, text: str) -> Report:
    """Progress of one training as progress of them all."""

    def part(done: int, total: int, _: str = "") -> None:
        report(before * total + done, max(expected, before + 1) * total, text)

    return part


def _accuracy(accuracies: Tensor, samples: int) -> Metric:
    """Mean over subspaces; the binomial error over the data is an upper bound for a mean."""
    p, runs = accuracies.mean().item(), len(accuracies)
    errors = {"data": math.sqrt(p * (1 - p) / samples)}
    if runs > 1:
        errors["subspaces"] = accuracies.std().item() / math.sqrt(runs)
    return Metric(p, errors=errors)


def _curve(tried: Tensor, accuracies: Tensor, largest: int) -> Curve:
    """Mean accuracy on the grid alone: bisected dimensions differ between checkpoints."""
    common = torch.isin(tried, torch.tensor(_grid(largest)))
    y, runs = accuracies[:, common], len(accuracies)
    error = (y.std(0) / math.sqrt(runs)).numpy() if runs > 1 else None
    return Curve(tried[common].double().numpy(), y.mean(0).numpy(), "d", error)


def _arrays(
    tried: Tensor, accuracies: Tensor, trainer: SubspaceTrainer, runs: list[Trained]
) -> dict[str, np.ndarray]:
    """All accuracies, and the best of `runs`: z, the seed that gives its P again, and its θ."""
    best = max(runs, key=lambda run: run.accuracy)
    return {
        "dimensions": tried.numpy(),
        "accuracies": accuracies.numpy(),  # one row per subspace
        "monotone_fit": isotonic(accuracies.mean(0)).numpy(),
        "z": best.z.cpu().numpy(),
        "z_seed": np.array(best.seed),
        "theta_subspace": trainer.point(best).cpu().numpy(),
    }


def _falling(tried: Tensor, accuracies: Tensor) -> list[str]:
    """More directions cannot hurt a training that works: a fall with d says that it does not."""
    means = accuracies.mean(0)
    fall = means.cummax(0).values - means
    worst = int(fall.argmax())
    if fall[worst] <= FALL:
        return []
    return [
        f"accuracy falls by {fall[worst]:.2g} towards d={tried[worst]}, so training fails there "
        "and d90 may be too large; lower lr"
    ]


def _notes(
    baseline: float, local: float, share: float, start: float, trained: dict[int, list[Trained]]
) -> tuple[str, ...]:
    threshold = share * (baseline or local)
    name = "global" if baseline else "local"
    whose = "given by the user" if baseline else "the checkpoint's own"
    notes = [
        f"{name} baseline: accuracy {baseline or local:.4g}, {whose}; threshold {threshold:.4g}",
        "the checkpoint enters by its start and its accuracy alone; checkpoints of one start "
        "share the accuracy at every d",
    ]
    if start >= threshold:
        notes.append(f"the start reaches the threshold untrained (accuracy {start:.4g})")
    runs = [run for several in trained.values() for run in several]
    lost = [run.accuracy for run in runs if run.diverged]
    if lost:
        notes.append(
            f"{len(lost)} of {len(runs)} trainings diverged and count as chance level "
            f"{lost[0]:.3g}; lower lr"
        )
    return tuple(notes)
