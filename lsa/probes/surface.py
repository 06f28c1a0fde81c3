"""The loss on a plane through the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from lsa.landscape import Landscape
from lsa.landscape.derivatives import budget
from lsa.landscape.grid import COLUMNS, Point, grid, point
from lsa.maths.planes import (
    Plane,
    filter_normalised,
    principal,
    random_walk_shares,
    through,
    window,
)
from lsa.maths.spectra import counts, eigenpairs
from lsa.probe import (
    Curve,
    Metric,
    Report,
    Result,
    Sizes,
    Work,
    between,
    lanczos_rows,
    lanczos_vectors,
    probe,
    standard_error,
)
from lsa.probe.options import ODD
from lsa.probe.work import POINT
from lsa.runtime.errors import InputError

PLANE = 6  # vectors that a plane without eigenvectors holds, for the estimate of the cost
MARGIN = 1.5  # side of the grid over the larger span of the points that a plane was laid through
CHECKPOINT = "checkpoint"  # name of the mark at θ


@dataclass(frozen=True)
class View:
    """A plane with the window on it that is measured, and the checkpoints marked on it."""

    plane: Plane
    xs: Tensor  # (m,) float64, ascending
    ys: Tensor  # (n,)
    labels: tuple[str, str]  # of the axes
    marks: Mapping[str, Tensor]  # name → θ
    metrics: Mapping[str, Metric]
    far: bool = False  # its points are far apart: batch norm is recalibrated at each
    notes: tuple[str, ...] = ()  # what has not converged


def _work(at: Sizes, *, points: int, plane: str, tol: float, **_: Any) -> Work:
    """One pass a point, and Lanczos to both ends for the Hessian's plane."""

    def of(search: float) -> Work:
        return Work(
            losses=float(points**2 * at.samples),
            gradients=float(at.samples),
            products=search * at.samples,
            curvatures=2.0 * at.samples,
            rows=lanczos_rows(search) + POINT * points**2,
            vectors=lanczos_vectors(search, at) if search else PLANE,
        )

    if plane != "hessian":
        return of(0)
    return between(of, counts.both(1, 1, tol, at.dimension))


@probe(work=_work)
def surface(
    landscape: Landscape,
    theta: Tensor,
    others: Mapping[str, Tensor],
    trajectory: Callable[[], Mapping[int, Tensor]],
    rng: torch.Generator,
    memory: MutableMapping[str, list[float]],
    report: Report,
    *,
    plane: Annotated[
        Literal["random", "hessian", "checkpoints", "trajectory"],
        "filter-normalised random directions; top and bottom eigenvector; through three "
        "checkpoints; principal components of the training",
    ] = "random",
    points: Annotated[
        int, "points of the grid per axis, odd so that the checkpoint is one", Field(ge=5), ODD
    ] = 25,
    extent: Annotated[float, "half-width of the grid in the plane's own scale", Field(gt=0)] = 1.0,
    tol: Annotated[float, "residual allowed of the eigenvectors, relative", Field(gt=0)] = 1e-2,
    max_products: Annotated[
        int, "Hessian products after which to stop unconverged", Field(ge=1)
    ] = 500,
) -> Result:
    """Loss and accuracy on a plane: random, Hessian, through three checkpoints or of the training.

    θ(x, y) = θ + x u + y v, every point on all samples of the landscape.

    random: u and v are standard normal, scaled filter by filter to the norm of the weights' filter;
    biases and normalisation parameters are left out (Li et al. 2018, "Visualizing the loss
    landscape of neural nets", §4, arXiv 1712.09913). v is made orthogonal to u within every filter
    first. The grid is ±extent in x and y. Scaling a layer by a > 0 and the next by 1/a leaves this
    surface of a ReLU network as it is; scaling single units does not.

    hessian: u and v are the eigenvectors of λ_max and λ_min, of unit length, pointing downhill; the
    grid is ±extent·√(2/λ_max), where the quadratic model along u rises by extent².

    checkpoints: the plane through this checkpoint and two more of the same network, u towards the
    second, in lengths of θ (Garipov et al. 2018, arXiv 1802.10026, Fig. 1). trajectory: from this
    checkpoint along the first two principal components of all that its training kept (Li et al.
    2018, §7); their path is marked, each with its distance from the plane and its own loss, which
    is not the plane's. `explained_x`, `explained_y` are their shares of the variance, beside those
    of a random walk, which are large as well and mean nothing (Antognini & Sohl-Dickstein 2018,
    arXiv 1806.08805). Both planes' grids are squares of 1.5·extent times the larger span of their
    points, with lines through 0, those of `checkpoints` through all three. Batch norm is
    recalibrated at each of their points, on the landscape's samples; elsewhere it is fixed.

    curvature_x and curvature_y are uᵀHu and vᵀHv. lowest_rise and highest_rise are the extremes on
    the grid over the loss at the checkpoint, with the paired error of that one point. Two
    directions of d show little: a random plane's curvature averages all eigenvalues, and so shows
    neither the sharp nor the negative ones.
    """
    _check(plane, len(others), len(theta))
    if plane == "random":
        view = _random(landscape, theta, rng, points, extent)
    elif plane == "hessian":
        find = _Lanczos(rng, tol, max_products, report)
        view = _hessian(landscape, theta, find, points, extent)
    elif plane == "checkpoints":
        view = _checkpoints(theta, others, points, extent)
    else:
        view = _trajectory(theta, trajectory(), points, extent)
    at = landscape.recalibrated if view.far else lambda _: landscape
    base = landscape.influences(at(theta).losses(theta)).double()
    measured = grid(view.plane, view.xs, view.ys, at, base, memory, report)
    marks = {name: point(at(t), t, base) for name, t in view.marks.items()}
    metrics = _metrics(at(theta), theta, view, measured, marks[CHECKPOINT])
    curves = {} if view.far else _curves(plane, view, measured)
    return Result(
        metrics,
        curves,
        _arrays(plane, view, measured, marks),
        not view.notes,
        (*view.notes, *_notes(at, theta, landscape, measured)),
    )


def _check(plane: str, others: int, dimension: int) -> None:
    if plane == "checkpoints" and others != 2:
        raise InputError(
            f"plane=checkpoints goes through three checkpoints, and {1 + others} given; name two "
            "more by optimizer_b=… and optimizer_c=…, or checkpoint_b and checkpoint_c"
        )
    if plane != "checkpoints" and others:
        raise InputError(
            f"plane={plane} is of one checkpoint, and {1 + others} are given; leave out the others "
            "or choose plane=checkpoints"
        )
    if dimension < 2:
        raise InputError("a network of one weight has no plane; choose a larger one")


# --- the planes ----------------------------------------------------------------------------------


def _random(
    landscape: Landscape, theta: Tensor, rng: torch.Generator, points: int, extent: float
) -> View:
    weights = landscape.unflatten(theta)
    first, second = (torch.randn(len(theta), generator=rng).to(theta) for _ in range(2))
    u = filter_normalised(weights, first)
    v = filter_normalised(weights, second, against=u)
    if not u.norm() > 0:
        raise InputError(
            "no parameter with two axes or more has a weight other than 0, so there are no filters "
            "to scale directions by; choose plane=hessian"
        )
    lengths = {f"length_{axis}": Metric(_norm(d)) for axis, d in (("x", u), ("y", v))}
    cosine = (u.double() @ v.double()).item() / (_norm(u) * _norm(v))
    axis = torch.linspace(-extent, extent, points, dtype=torch.float64)
    return View(
        Plane(theta, torch.stack([u, v], 1)),
        axis,
        axis,
        ("x, first random direction (filter norms)", "y, second random direction (filter norms)"),
        {CHECKPOINT: theta},
        {**lengths, "cosine": Metric(cosine)},
    )


class _Lanczos(NamedTuple):
    """Options of the search for the eigenvectors."""

    rng: torch.Generator
    tol: float
    max_products: int
    report: Report


def _hessian(
    landscape: Landscape, theta: Tensor, find: _Lanczos, points: int, extent: float
) -> View:
    start = eigenpairs.start_vector(theta, find.rng, landscape.gradient(theta))
    extremes = eigenpairs.lanczos(
        landscape.hessian(theta), start, **find._asdict(), basis=budget.basis(theta, 2)
    )
    lambda_max, lambda_min = extremes.largest.values[0].item(), extremes.smallest.values[0].item()
    if not lambda_max > 0:
        raise InputError(
            f"λ_max={lambda_max:.3g} is not positive, so no direction of this landscape is sharp "
            "and the grid has no scale; train further"
        )
    directions = torch.cat([extremes.largest.vectors, extremes.smallest.vectors], 1)
    uphill = landscape.gradient(theta) @ directions > 0
    directions = torch.where(uphill, -directions, directions)
    reach = extent * (2 / lambda_max) ** 0.5
    axis = reach * torch.linspace(-1, 1, points, dtype=torch.float64)
    return View(
        Plane(theta, directions),
        axis,
        axis,
        ("x, eigenvector of λ_max (length in θ)", "y, eigenvector of λ_min (length in θ)"),
        {CHECKPOINT: theta},
        {"lambda_max": Metric(lambda_max, "loss"), "lambda_min": Metric(lambda_min, "loss")},
        notes=tuple(extremes.shortfall("eigenvectors")),
    )


def _checkpoints(theta: Tensor, others: Mapping[str, Tensor], points: int, extent: float) -> View:
    marks = {CHECKPOINT: theta, **others}
    plane = through(*marks.values())
    coordinates = torch.tensor(
        [plane.coordinates(t)[:2] for t in marks.values()], dtype=torch.float64
    )
    b, c = others
    return View(
        plane,
        *window(coordinates, points, MARGIN * extent, lines=coordinates),
        (f"x, towards {b} (length in θ)", f"y, {c}'s side (length in θ)"),
        marks,
        {},
        far=True,
    )


def _trajectory(theta: Tensor, kept: Mapping[int, Tensor], points: int, extent: float) -> View:
    marks = {f"epoch {e}": t for e, t in kept.items() if not torch.equal(t, theta)}
    marks[CHECKPOINT] = theta
    path = list(marks.values())
    plane, shares = principal(path)
    coordinates = torch.tensor([plane.coordinates(t) for t in path], dtype=torch.float64)
    walk = random_walk_shares(len(path))
    distance = coordinates[:, 2].max().item() / _norm(path[0] - theta)
    metrics = {"out_of_plane": Metric(distance, "fraction")}
    for i, axis in enumerate("xy"):
        metrics[f"explained_{axis}"] = Metric(shares[i].item(), "fraction")
        metrics[f"random_walk_{axis}"] = Metric(walk[i].item(), "fraction")
    return View(
        plane,
        *window(coordinates[:, :2], points, MARGIN * extent, lines=torch.zeros(1, 2)),
        ("x, first principal component (length in θ)", "y, second (length in θ)"),
        marks,
        metrics,
        far=True,
    )


def _norm(x: Tensor) -> float:
    return torch.linalg.vector_norm(x, dtype=torch.float64).item()


# --- numbers -------------------------------------------------------------------------------------


def _metrics(
    landscape: Landscape, theta: Tensor, view: View, measured: np.ndarray, centre: Point
) -> dict[str, Metric]:
    metrics = {"loss": Metric(centre.loss, "loss", _errors(centre.loss_error))}
    if np.isfinite(centre.error):
        metrics["error"] = Metric(centre.error, "fraction", _errors(centre.error_error))
    for axis, u in zip("xy", view.plane.directions.unbind(1), strict=True):
        bend = landscape.influences(landscape.curvatures(theta, u)).double()
        metrics[f"curvature_{axis}"] = Metric(bend.mean().item(), "loss", standard_error(bend))
    metrics |= view.metrics
    for name, axis in (("lambda_max", "x"), ("lambda_min", "y")):
        if name in metrics:
            errors = metrics[f"curvature_{axis}"].errors
            metrics[name] = Metric(metrics[name].value, "loss", errors)
    finite = np.isfinite(measured[..., 0])
    if finite.any():
        losses = np.where(finite, measured[..., 0], np.nan)
        for name, index in (("lowest", np.nanargmin(losses)), ("highest", np.nanargmax(losses))):
            point = Point(*measured.reshape(-1, len(COLUMNS))[index])
            rise = Metric(point.loss - centre.loss, "loss", _errors(point.rise_error))
            metrics[f"{name}_rise"] = rise
    return metrics | {
        "not_finite": Metric(float((~finite).sum())),
        "n_samples": Metric(landscape.n_samples),
    }


def _errors(data: float) -> dict[str, float]:
    return {"data": data} if np.isfinite(data) else {}


def _curves(plane: str, view: View, measured: np.ndarray) -> dict[str, Curve]:
    """Rises along the two axes, on a grid that all checkpoints share.

    Named by the plane, so that nobody draws those of two kinds into one figure.
    """
    middle = len(view.xs) // 2
    at = torch.linspace(-1, 1, len(view.xs), dtype=torch.float64).numpy()
    lines = {
        f"rise_along_{plane}_x": measured[middle],
        f"rise_along_{plane}_y": measured[:, middle],
    }
    base = measured[middle, middle, 0]
    return {
        name: Curve(at, line[:, 0] - base, "relative_position", line[:, 2], y_unit="loss")
        for name, line in lines.items()
    }


def _arrays(
    plane: str, view: View, measured: np.ndarray, marks: Mapping[str, Point]
) -> dict[str, np.ndarray]:
    coordinates = np.array([view.plane.coordinates(t) for t in view.marks.values()])
    values = np.array(list(marks.values()))
    arrays = {
        "plane": np.array(plane),
        "labels": np.array(view.labels),
        "x": view.xs.numpy(),
        "y": view.ys.numpy(),
        **{name: measured[..., k] for k, name in enumerate(COLUMNS)},
        "mark": np.array(list(marks)),
        "mark_x": coordinates[:, 0],
        "mark_y": coordinates[:, 1],
        "mark_distance": coordinates[:, 2],
        **{f"mark_{name}": values[:, k] for k, name in enumerate(COLUMNS)},
    }
    surface = {f"surface.{name}": np.array(array) for name, array in arrays.items()}
    return surface | {"directions": view.plane.directions.cpu().numpy()}


def _notes(
    at: Callable[[Tensor], Landscape], theta: Tensor, landscape: Landscape, measured: np.ndarray
) -> list[str]:
    notes = []
    if bad := int((~np.isfinite(measured[..., 0])).sum()):
        notes.append(
            f"the loss is not finite at {bad} of {measured[..., 0].size} points of the grid, which "
            "are left blank: the network overflows there"
        )
    if at(theta) is not landscape:
        notes.append(
            f"batch norm was recalibrated at every point on {landscape.n_samples} training "
            "samples, so the loss at a checkpoint may differ from its own"
        )
    return notes
