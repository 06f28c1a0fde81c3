"""Loss and error on the straight line through two checkpoints, also after aligning their units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from lsa.landscape import Landscape, aligning
from lsa.landscape.aligning import Moved
from lsa.landscape.derivatives import batch_norm
from lsa.maths import bootstrap
from lsa.maths.paths import polyline
from lsa.probe import (
    Curve,
    Metric,
    Report,
    Result,
    Sizes,
    Work,
    between,
    probe,
    standard_error,
)
from lsa.probe.work import POINT
from lsa.runtime.errors import InputError

ROUNDING = 1e-6  # of a loss
# Rows of a basis that one part of a transformer costs: its symmetries are tried, and it is aligned
# with that of the other checkpoint. As seen for 0.8 and 10.7 million parameters.
ALIGNED = 185
BARRIERS = {"barrier": "linear", "barrier_mean": "mean", "barrier_max": "max"}


def _work(at: Sizes, *, points: int, align: str, **_: Any) -> Work:
    """Both splits at every point of one or two lines."""

    aligning = ALIGNED * at.symmetric if align == "weights" else 0.0

    def of(lines: int) -> Work:
        return Work(
            losses=lines * (points * (at.samples + at.validation) - 2 * at.samples),  # with slopes
            gradients=2.0 * lines * at.samples,
            rows=2 * POINT * lines * points + aligning,
            vectors=4,
        )

    return between(of, (1, 2, 2)) if align == "weights" else of(1)  # one, where no unit has moved


def _both_ends(points: int) -> int:
    if (points - 1) % 4:
        raise ValueError(
            "4m + 1, so that alpha=0 and 1 are on the grid on [-0.5, 1.5]; the nearest is "
            f"{4 * max(1, round((points - 1) / 4)) + 1}"
        )
    return points


@probe(
    headline=("barrier", "alpha_min", "barrier_aligned"),
    work=_work,
    between={"train_loss": "straight line", "train_loss_aligned": "straight line, units aligned"},
)
def interpolation(
    landscape: Landscape,
    validation: Landscape,
    theta: Tensor,
    theta_b: Tensor,
    rng: torch.Generator,
    report: Report,
    *,
    points: Annotated[
        int,
        "points on [-0.5, 1.5]; 4m + 1, so that both ends are among them",
        Field(ge=5),
        AfterValidator(_both_ends),
    ] = 61,
    align: Annotated[
        Literal["none", "weights"], "also after matching the hidden units of B to those of A"
    ] = "weights",
) -> Result:
    """Loss and error on the line through two checkpoints: the barrier between them, its slopes.

    θ(α) = (1−α)θ_A + αθ_B for α in [−0.5, 1.5], train and test; 61 points put 31 into [0, 1]
    (Frankle et al. 2020 use 30). A barrier is the largest height on [0, 1]: above the straight line
    between both ends (`barrier`, Entezari et al. 2022), their mean (`barrier_mean`, Frankle et al.
    2020) or the higher of them (`barrier_max`), of the train loss where no other quantity is named.
    `alpha_min` is where the train loss is lowest; `slope_a` and `slope_b` are dL/dα at α = 0 and 1.
    Errors over the data are paired: the same samples at all α. They come from the bootstrap (Efron
    1979), because a maximum is no smooth function of the data. The shift of the resamples' mean is
    added to their deviation, so that two errors cover the truth in 90 % of cases or more.

    Renumbering hidden units moves a network's weights but not its function. So the line to the
    renumbering of B nearest to A is measured as well, `…_aligned` (Ainsworth et al. 2023). It is
    the best of several local optima; another `rng` may give another. In transformers heads, queries
    against keys, values against outputs and the residual stream are aligned too (Theus et al. 2025,
    arXiv 2506.22712). If alignment raises the barrier, the unaligned line is used for both.
    Batch norm is recalibrated at every α on the training samples, the ends included (Jordan et
    al. 2023).
    """
    _check(landscape, theta, theta_b)
    alphas = _grid(points)
    spec, notes = aligning.alignable(landscape, theta) if align == "weights" else (None, [])
    moved = aligning.align(landscape, spec, theta, theta_b, rng) if spec else None
    ends = {"": theta_b} | ({"_aligned": moved.end} if moved else {})
    metrics, curves = _sizes(landscape, validation, theta, theta_b), {}
    line, end = None, theta_b
    for i, (suffix, other) in enumerate(ends.items()):
        if line is None or not torch.equal(other, theta_b):  # else no unit has moved
            step = _part(report, i * points, len(ends) * points, f"line{suffix.replace('_', ' ')}")
            new = _line(landscape, validation, theta, other, alphas, step)
            if line is None or not _higher(new, line, alphas):
                line, end = new, other
            else:
                notes.append(
                    "the aligned line has the higher barrier, so its numbers are those of the "
                    "line without alignment"
                )
        metrics |= {name + suffix: metric for name, metric in _metrics(line, alphas, rng).items()}
        metrics["distance" + suffix] = Metric(_norm(end - theta))
        curves |= {name + suffix: curve for name, curve in _curves(line, alphas).items()}
    if moved:
        metrics["units_moved"] = Metric(moved.units_moved, "fraction")
    table = {"alpha": alphas.numpy(), **{name: curve.y for name, curve in curves.items()}}
    arrays = {f"interp_data.{name}": values for name, values in table.items()}
    notes += [*_notes_on(moved, landscape), *_notes_on_curves(curves)]
    converged = moved is None or moved.converged
    return Result(metrics, curves, arrays, converged, tuple(notes))


def _part(report: Report, done: int, total: int, text: str) -> Callable[[int], None]:
    """Progress of one line among several, by the number of its points that are measured."""
    return lambda points: report(done + points, total, text)


def _check(landscape: Landscape, theta: Tensor, theta_b: Tensor) -> None:
    d = landscape.dimension
    if theta.shape != (d,) or theta_b.shape != (d,):
        raise InputError(
            f"theta {tuple(theta.shape)} and theta_b {tuple(theta_b.shape)} must be vectors of "
            f"d={d} parameters; give two checkpoints of one architecture"
        )
    if not (theta.isfinite().all() and theta_b.isfinite().all()):
        raise InputError("a checkpoint holds weights that are not finite; give one that trained")
    if torch.equal(theta, theta_b):
        raise InputError("both checkpoints are the same point; give two that differ")


def _grid(points: int) -> Tensor:
    """α on [−0.5, 1.5], float64, with −0.5, 0, 1 and 1.5 exact; `points` is 4m + 1."""
    m = (points - 1) // 4
    return torch.arange(-m, 3 * m + 1, dtype=torch.float64) / (2 * m)


# --- one line -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    """Losses and mistakes on one line."""

    samples: dict[str, Tensor]  # quantity -> its value for each α and sample, (points, N), CPU
    slopes: tuple[Metric, Metric]  # dL/dα at A and B


def _line(
    landscape: Landscape,
    validation: Landscape,
    a: Tensor,
    b: Tensor,
    alphas: Tensor,
    report: Callable[[int], None],
) -> _Line:
    rows: dict[str, list[Tensor]] = {}
    slopes = []
    for i, alpha in enumerate(alphas.tolist()):
        theta = torch.lerp(a, b, alpha)  # bitwise a and b at 0 and 1
        train = landscape.recalibrated(theta)
        if alpha in (0, 1):
            losses, wrong, directional = train.per_sample_and_slopes(theta, b - a)
            slopes.append(_slope(train.influences(directional).double()))
        else:
            losses, wrong = train.per_sample(theta)
        # The held-out samples pass through statistics of the training samples.
        test = train.with_data_of(validation)
        held_out = test.per_sample(theta)
        splits = (train, "train", (losses, wrong)), (test, "test", held_out)
        for split, name, (loss, error) in splits:
            rows.setdefault(f"{name}_loss", []).append(split.influences(loss))
            if error is not None:
                rows.setdefault(f"{name}_error", []).append(error)
        report(i + 1)
    # Kept whole: a row of numbers per sample is less than the sample itself.
    tables = {name: torch.stack(r).cpu() for name, r in rows.items()}
    return _Line(tables, (slopes[0], slopes[1]))


def _slope(slopes: Tensor) -> Metric:
    """dL/dα = ∇L·(θ_B − θ_A); its error from the spread of the per-sample slopes."""
    return Metric(slopes.mean().item(), "loss", standard_error(slopes))


def _higher(line: _Line, other: _Line, alphas: Tensor) -> bool:
    """Whether the barrier of the train loss is higher on a line than on another; nan is."""
    losses = [each.samples["train_loss"].double().mean(1) for each in (line, other)]
    first, second = (polyline.barriers(each, alphas).linear for each in losses)
    rounding = ROUNDING * losses[1].nan_to_num(0).abs().max()
    return bool(first.isnan() and not second.isnan()) or bool(first > second + rounding)


# --- numbers --------------------------------------------------------------------------------------


def _metrics(line: _Line, alphas: Tensor, rng: torch.Generator) -> dict[str, Metric]:
    means = bootstrap.means(line.samples, rng)
    metrics = {}
    for quantity, rows in means.items():
        suffix = "" if quantity == "train_loss" else f"_{quantity}"
        heights = polyline.barriers(rows, alphas)
        for name, definition in BARRIERS.items():
            metrics[name + suffix] = _bootstrapped(getattr(heights, definition), _unit(quantity))
    metrics["alpha_min"] = _lowest(means["train_loss"], alphas)
    return metrics | {"slope_a": line.slopes[0], "slope_b": line.slopes[1]}


def _lowest(means: Tensor, alphas: Tensor) -> Metric:
    """α of the smallest mean, and the deviation of a number rounded to the grid's step."""
    finite = means.isfinite()
    values = alphas[torch.where(finite, means, torch.inf).argmin(1)]
    if not finite[0].any():
        return Metric(float("nan"))
    rounding = (alphas[1] - alphas[0]).item() / 12**0.5
    lowest = _bootstrapped(values, "")
    return Metric(lowest.value, errors={**lowest.errors, "grid": rounding})


def _bootstrapped(values: Tensor, unit: str) -> Metric:
    value, error = bootstrap.estimate(values)
    return Metric(value, unit, {} if error is None else _data(error))


def _unit(quantity: str) -> str:
    return "loss" if quantity.endswith("loss") else "fraction"


def _curves(line: _Line, alphas: Tensor) -> dict[str, Curve]:
    return {name: _curve(name, samples, alphas) for name, samples in line.samples.items()}


def _curve(name: str, samples: Tensor, alphas: Tensor) -> Curve:
    values, n = samples.double(), samples.shape[1]
    error = (values.std(1) / n**0.5).numpy() if n > 1 else None
    return Curve(alphas.numpy(), values.mean(1).numpy(), "alpha", error, y_unit=_unit(name))


def _data(error: float) -> dict[str, float]:
    return {"data": error} if np.isfinite(error) else {}


def _sizes(landscape: Landscape, validation: Landscape, a: Tensor, b: Tensor) -> dict[str, Metric]:
    return {
        "norm_a": Metric(_norm(a)),
        "norm_b": Metric(_norm(b)),
        "n_samples": Metric(landscape.n_samples),
        "n_samples_test": Metric(validation.n_samples),
    }


def _norm(theta: Tensor) -> float:
    return torch.linalg.vector_norm(theta, dtype=torch.float64).item()


# --- notes ----------------------------------------------------------------------------------------


def _notes_on(aligned: Moved | None, landscape: Landscape) -> list[str]:
    notes = []
    if aligned and not aligned.converged:
        notes.append("the alignment did not converge: matching one more group would improve it")
    if batch_norm.layers(landscape.model):
        notes.append(
            f"batch norm was recalibrated at every alpha on {landscape.n_samples} training "
            "samples, so losses at alpha=0 and 1 may differ from the checkpoints' own; the slopes "
            "hold its statistics fixed"
        )
    return notes


def _notes_on_curves(curves: dict[str, Curve]) -> list[str]:
    notes = []
    for name, curve in curves.items():
        bad = curve.x[~np.isfinite(curve.y)]
        if len(bad):
            notes.append(
                f"{name} is not finite at {len(bad)} of {len(curve.x)} points, from "
                f"alpha={bad.min():.3g} to {bad.max():.3g}"
            )
        elif name == "train_loss" and curve.y.argmin() in (0, len(curve.y) - 1):
            notes.append("train_loss is lowest at an end of the grid; its minimum lies beyond")
    return notes
