"""The loss along the sharpest, the most negative and a random direction."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from lsa.landscape import Landscape
from lsa.landscape.derivatives import budget
from lsa.landscape.float64 import in_float64
from lsa.maths.spectra import counts, eigenpairs
from lsa.probe import (
    Curve,
    Metric,
    Report,
    Result,
    Same,
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

NEAR = 0.05  # of the reach: the step whose finite curvature is reported
AGREEMENT = 0.01  # relative difference of fitted and computed curvature that is flagged
# Vectors that slopes in float64 hold, and three directions: for the estimate of the cost.
FINE, LINES = 20, 6
PRECISION = 1e-8  # relative rounding error that the fit may have; sets its width
FLAT = 1e-4  # of λ_max: a curvature below is taken for 0, which float32 could not tell from it
# Over that of float64: where the network computes in float32 inside, narrow fits are rounding.
WIDTHS = (1, 30, 1e3, 3e4, 1e6)


class Fit(NamedTuple):
    """L(θ + εv) − L(θ) ≈ slope ε + curvature ε²/2 for |ε| ≤ half_width."""

    slope: float
    curvature: float
    half_width: float


def _work(at: Sizes, *, points: int, tol: float, **_: Any) -> Work:
    """Lanczos to both ends, three lines of points, and slopes in float64 (twice the price)."""

    def of(search: float) -> Work:
        return Work(
            losses=(3 * points + 8) * at.samples,
            gradients=20.0 * at.samples,
            products=(search + 3) * at.samples,
            curvatures=3.0 * at.samples,
            rows=lanczos_rows(search) + POINT * (3 * points + 8),
            vectors=max(lanczos_vectors(search, at), FINE) + LINES,
        )

    return between(of, counts.both(1, 1, tol, at.dimension))


@probe(
    headline=("curvature_fit", "asymmetry", "rise_at_step"),
    work=_work,
    compare=("curvature_fit", "rise_at_step"),
    check=(Same("λ_max", "curvature_fit", "lanczos/lambda_max", within=0.01),),
    curve="loss_along_top",
    scale="reach",
    caption="Rise of the loss along the top eigenvector, all checkpoints over the same lengths of "
    "the step: see which valley is steeper, and whether it is symmetric. It is one direction of "
    "many, and its length is no measure that survives a rescaling of the layers.",
)
def perturbation(
    landscape: Landscape,
    theta: Tensor,
    rng: torch.Generator,
    report: Report,
    *,
    points: Annotated[int, "points of the grid, odd so that 0 is one", Field(ge=5), ODD] = 41,
    rise: Annotated[
        float, "loss rise that the quadratic model has at the grid's ends", Field(gt=0)
    ] = 1.0,
    step: Annotated[
        float, "length in θ of the step at which checkpoints are compared", Field(gt=0)
    ] = 0.1,
    tol: Annotated[float, "residual allowed of the eigenvectors, relative", Field(gt=0)] = 1e-2,
    max_products: Annotated[
        int, "Hessian products after which to stop unconverged", Field(ge=1)
    ] = 500,
) -> Result:
    """Loss along ± the top Hessian eigenvector, that of λ_min, and a random direction.

    All three unit vectors share one grid ε ∈ [−ε*, ε*], ε* = √(2·rise/λ_max), on which the
    quadratic model of the top direction rises by `rise`; curves are logged against ε/ε*.
    Eigenvectors point downhill (gᵀv ≤ 0), which fixes their sign.

    curvature_fit is that of the parabola with the slopes of the loss at both ends of the narrowest
    interval that rounding allows: wider ones hold kinks of ReLU and max-pooling. It starts from
    float64's, and is wider where the network computes in float32 inside: until two fits agree, or
    one with vᵀHv. It must equal λ_max within 1 %, or the result is not converged. curvature_finite
    is the second difference over a step of 5 % of ε*, such as an optimizer makes.

    loss_rise is the mean rise at ±ε*, which is `rise` for a quadratic; asymmetry is half the
    difference of the rises at the two ends over that mean. ε* is each checkpoint's own, shorter
    where it is sharper, so what compares checkpoints is rise_at_step: the mean rise at ±`step`, one
    length for all; its default was chosen here. The random direction is the control:
    its curvature is tr H/d on average. A residual of `tol` changes an eigenvalue by its square.
    """
    in_float64(landscape)  # which the fits need, after the search
    hessian, gradient = landscape.hessian(theta), landscape.gradient(theta)
    ends = eigenpairs.lanczos(
        hessian,
        eigenpairs.start_vector(theta, rng, gradient),
        rng=rng,
        tol=tol,
        max_products=max_products,
        basis=budget.basis(theta, 2),
        report=report,
    )
    control = torch.randn(len(theta), generator=rng).to(theta)
    directions = {
        "top": _downhill(ends.largest.vectors[:, 0], gradient),
        "bottom": _downhill(ends.smallest.vectors[:, 0], gradient),
        "random": _downhill(control / control.norm(), gradient),
    }
    lambda_max = ends.largest.values[0].item()
    reach = _reach(rise, lambda_max)
    unit = torch.linspace(-1, 1, points, dtype=torch.float64)
    base, fine = landscape.influences(landscape.losses(theta)).double(), landscape.double()
    metrics, curves, notes = {}, {}, []
    total, arrays = 3 * points, {"eps_list": (reach * unit).numpy()}
    for i, (name, v) in enumerate(directions.items()):
        rises = _rises(landscape, theta, v, reach * unit, base, report, i * points, total)
        curves[f"loss_along_{name}"] = _curve(unit, rises)
        curvature = (v.double() @ hessian(v).double()).item()
        slope = (gradient.double() @ v.double()).item()
        fit = _fit(fine, theta.double(), v.double(), curvature, lambda_max)
        bend = standard_error(landscape.influences(landscape.curvatures(theta, v)))
        metrics |= _described(
            name, fit, curvature, bend, slope, landscape.influences(landscape.slopes(theta, v))
        )
        if name == "top":
            metrics |= _shape(rises) | _at_step(landscape, theta, v, step, base)
            metrics |= _finite(fine, theta.double(), v, NEAR * reach)
            metrics["lambda_max"] = Metric(lambda_max, "loss", bend)
            notes += _verdict(fit, curvature, lambda_max)
        if name == "bottom":
            metrics["lambda_min"] = Metric(ends.smallest.values[0].item(), "loss", bend)
    arrays["losses"] = base.mean().item() + np.stack([curves[c].y for c in curves])
    metrics |= {"reach": Metric(reach), "n_samples": Metric(landscape.n_samples)}
    notes += ends.shortfall("eigenvectors")
    return Result(metrics, curves, arrays, not notes, tuple(notes))


def _reach(rise: float, lambda_max: float) -> float:
    """ε*, at which the quadratic model of the top direction rises by `rise`."""
    if not lambda_max > 0:
        raise InputError(
            f"λ_max={lambda_max:.3g} is not positive, so no direction of this landscape is sharp "
            "and the grid has no scale; train further"
        )
    return (2 * rise / lambda_max) ** 0.5


def _downhill(v: Tensor, gradient: Tensor) -> Tensor:
    return -v if gradient @ v > 0 else v


def _rise(landscape: Landscape, theta: Tensor, v: Tensor, eps: float, base: Tensor) -> Tensor:
    """Per-sample rises ℓᵢ(θ + εv) − ℓᵢ(θ); none at ε = 0, where θ itself is meant."""
    if eps == 0:
        return torch.zeros_like(base)
    return landscape.influences(landscape.losses(theta + eps * v)).double() - base


def _rises(
    landscape: Landscape,
    theta: Tensor,
    v: Tensor,
    grid: Tensor,
    base: Tensor,
    report: Report,
    done: int,
    total: int,
) -> Tensor:
    """Per-sample rises on the grid, `(points, N)`."""
    rises = []
    for j, eps in enumerate(grid.tolist()):
        rises.append(_rise(landscape, theta, v, eps, base).cpu())
        report(done + j + 1, total, "loss along directions")
    return torch.stack(rises)


def _at_step(
    landscape: Landscape, theta: Tensor, v: Tensor, step: float, base: Tensor
) -> dict[str, Metric]:
    """Mean of the rises at ± a step, with its error over the samples."""
    rises = [_rise(landscape, theta, v, sign * step, base) for sign in (-1, 1)]
    mean = (rises[0] + rises[1]) / 2
    return {"rise_at_step": Metric(mean.mean().item(), "loss", standard_error(mean))}


def _curve(unit: Tensor, rises: Tensor) -> Curve:
    """Mean rises with their standard errors over the samples, paired with ε = 0."""
    errors = rises.std(1) / rises.shape[1] ** 0.5
    return Curve(
        unit.numpy(), rises.mean(1).numpy(), "relative_epsilon", errors.numpy(), y_unit="loss"
    )


def _fit(
    landscape: Landscape, theta: Tensor, v: Tensor, curvature: float, lambda_max: float
) -> Fit:
    """Slope and curvature at 0 of the parabola that has the loss's slopes at ±half_width.

    Of widths that grow, the first whose curvature agrees with vᵀHv; else the first that agrees
    with the next; else the widest, which has the least rounding.
    """

    def slope(eps: float) -> float:
        return (landscape.gradient(theta + eps * v) @ v).item()

    def agree(a: float, b: float) -> bool:
        return abs(a - b) <= AGREEMENT * max(abs(a), FLAT * lambda_max)

    narrowest = torch.finfo(theta.dtype).eps * max(1.0, abs(slope(0.0))) / PRECISION / lambda_max
    fits: list[Fit] = []
    for half in (narrowest * width for width in WIDTHS):
        left, right = slope(-half), slope(half)
        fits.append(Fit((left + right) / 2, (right - left) / (2 * half), half))
        if agree(fits[-1].curvature, curvature):
            return fits[-1]
    pairs = (a for a, b in pairwise(fits) if a.curvature and agree(a.curvature, b.curvature))
    return next(pairs, fits[-1])


def _finite(landscape: Landscape, theta: Tensor, v: Tensor, eps: float) -> dict[str, Metric]:
    """Second difference of the loss over ±ε, with its error over the samples."""
    base, v = landscape.influences(landscape.losses(theta)), v.double()
    rises = [_rise(landscape, theta, v, sign * eps, base) for sign in (-1, 1)]
    second = (rises[0] + rises[1]) / eps**2
    return {"curvature_finite": Metric(second.mean().item(), "loss", standard_error(second))}


def _described(
    name: str, fit: Fit, curvature: float, bend: dict[str, float], slope: float, slopes: Tensor
) -> dict[str, Metric]:
    """Curvature and slope by the fit and by derivatives, with one error: it is of one number."""
    suffix = "" if name == "top" else f"_{name}"
    tilt = standard_error(slopes)
    return {
        f"curvature_fit{suffix}": Metric(fit.curvature, "loss", bend),
        f"curvature{suffix}": Metric(curvature, "loss", bend),
        f"slope_fit{suffix}": Metric(fit.slope, "loss", tilt),
        f"slope{suffix}": Metric(slope, "loss", tilt),
    }


def _shape(rises: Tensor) -> dict[str, Metric]:
    """Mean rise at the grid's two ends, and how unequal they are."""
    mean, difference = (rises[-1] + rises[0]) / 2, (rises[-1] - rises[0]) / 2
    metrics = {"loss_rise": Metric(mean.mean().item(), "loss", standard_error(mean))}
    if not mean.mean():
        return metrics | {"asymmetry": Metric(float("nan"))}
    asymmetry = difference.mean() / mean.mean()
    influences = (difference - asymmetry * mean) / mean.mean()
    return metrics | {"asymmetry": Metric(asymmetry.item(), "", standard_error(influences))}


def _verdict(fit: Fit, curvature: float, lambda_max: float) -> list[str]:
    off = abs(fit.curvature - lambda_max) / lambda_max
    if off <= AGREEMENT:
        return []
    cause = f"the loss has kinks within ε=±{fit.half_width:.2g}, or part of it is in half precision"
    if abs(fit.curvature - curvature) <= AGREEMENT * abs(fit.curvature):
        cause = "λ_max is not converged"
    return [
        f"the fitted curvature {fit.curvature:.4g} differs from λ_max={lambda_max:.4g} by "
        f"{off:.1%}: {cause}"
    ]
