"""How much the loss rises near a checkpoint: one step of SAM, the worst case and the average."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from lsa.landscape import Landscape, sam
from lsa.landscape.worst_case import Ascents, Ball, agreeing, height, rise_in, search
from lsa.maths.ascent import Peak
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

FRACTIONS = np.linspace(0, 1, 11)  # of the way to a perturbation at which the rise is shown
STEP = 6  # rows, of a step of an ascent: sums over θ beside its gradient
CLIMBS = (2, 15, 40)  # gradients of an ascent, few, usual and many: for the estimate of the cost
SAM = 5  # for its step, and how that turns with the gradient: slopes of samples take two


def _work(at: Sizes, *, probes: int, starts: int, m: int, **_: Any) -> Work:
    """Two balls: ascents (again on batches, if any), two lines of points, and random pairs."""

    def of(climb: int) -> Work:
        points = 1.0 + 2 * (2 * (len(FRACTIONS) - 1) + 2 * probes + 1)
        climbs = 2.0 * climb * starts * (2 if m else 1)
        return Work(
            losses=points * at.samples,
            gradients=(climbs + 2.0 * SAM) * at.samples,
            rows=STEP * climbs + POINT * points,
            vectors=16,
        )

    return between(of, CLIMBS)


@probe(
    headline=(
        "worst_case",
        "average_case",
        "adaptive_worst_case",
        "adaptive_average_case",
    ),
    work=_work,
    compare=("worst_case", "average_case", "adaptive_worst_case", "adaptive_average_case"),
    curve="adaptive_rise_along_worst",
    caption="Rise of the loss on the way to the worst perturbation found, relative to each "
    "weight, so that rescaled layers do not change it. Sharpness of a whole network "
    "predicts generalisation badly: it follows the learning rate and the train loss.",
)
def sharpness(
    landscape: Landscape,
    theta: Tensor,
    rng: torch.Generator,
    report: Report,
    *,
    rho: Annotated[float, "radius of the ball, in the unit of θ", Field(gt=0)] = 0.05,
    adaptive_rho: Annotated[
        float, "radius of the adaptive ball, relative to |θ|", Field(gt=0)
    ] = 0.5,
    sigma: Annotated[float, "standard deviation of noise on every weight", Field(gt=0)] = 0.01,
    adaptive_sigma: Annotated[float, "the same, relative to the weight", Field(gt=0)] = 0.1,
    probes: Annotated[
        int, "random directions of the average case, each taken both ways", Field(ge=2)
    ] = 20,
    starts: Annotated[
        int, "ascents to the worst case: one from SAM's step, the rest random", Field(ge=1)
    ] = 8,
    tol: Annotated[
        float, "rise that the ball may still offer to first order, relative", Field(gt=0)
    ] = 1e-3,
    max_gradients: Annotated[
        int, "gradients per ascent after which to stop unconverged", Field(ge=1)
    ] = 100,
    m: Annotated[int, "samples per batch of m-sharpness; 0 leaves it out", Field(ge=0)] = 0,
) -> Result:
    """Loss rise near the checkpoint: SAM's step, the worst case, the average; plain and adaptive.

    Plain perturbations are ε with |ε| ≤ ρ; adaptive ones (prefix `adaptive_`) are ε = |θ|∘e with
    |e| ≤ ρ, so that scaling a layer by c > 0 and the next by 1/c changes nothing (Kwon et al. 2021;
    Andriushchenko et al. 2023). All numbers are rises of the loss on the whole split.

    sam_rise: at the first-order maximiser ε = ρ g/|g|, adaptive ρ T²g/|Tg| with T = diag|θ|
    (Foret et al. 2021, §2; Kwon et al. 2021, §4; their ρ for CIFAR-10 are 0.05 and 0.5).

    worst_case: the largest rise that projected ascents reach in the ball, a lower bound of the
    maximum, at least sam_rise and 0. An ascent ends when the ball offers less than `tol` more to
    first order, or when the rise gains less than a tenth of `tol` in ten gradients.

    average_case: mean rise under Gaussian noise of standard deviation σ on every weight, adaptive
    σ|θᵢ|, over pairs ±ε. 0.1 is of the grid of Andriushchenko et al.; 0.01 is chosen here.

    m_sharpness: mean over disjoint random batches of m samples of the worst case on each (Foret et
    al. 2021, §4.1); its standard error is over the batches.

    Standard errors over the data are first-order: of a fixed worst perturbation, but of SAM's step
    with how it turns with the gradient.
    """
    if m > landscape.n_samples:
        raise InputError(
            f"m={m}: choose a batch of 1 to {landscape.n_samples} samples, or 0 for no m-sharpness"
        )
    ascents = Ascents(starts, tol, max_gradients, report)
    balls = (
        Ball("", torch.ones_like(theta), rho, sigma),
        Ball("adaptive_", theta.abs(), adaptive_rho, adaptive_sigma),
    )
    base = landscape.influences(landscape.losses(theta)).double()
    metrics: dict[str, Metric] = {"n_samples": Metric(landscape.n_samples)}
    curves: dict[str, Curve] = {}
    notes: list[str] = []
    converged = True
    for ball in balls:
        highest = _highest(landscape, theta, ball, base, rng, ascents)
        average = _average(landscape, theta, ball, base, rng, probes, report)
        metrics |= {**highest.metrics, f"{ball.prefix}average_case": average}
        curves |= highest.curves
        notes += highest.notes
        converged &= highest.converged
    if m:
        on_batches, missed = _on_batches(landscape, theta, balls, rng, m, ascents)
        metrics |= on_batches
        notes += _doubts_on_batches(missed, landscape.n_samples % m, m)
        converged &= not missed
    arrays = {
        "radii": np.array([ball.radius for ball in balls]),
        "sigmas": np.array([ball.sigma for ball in balls]),
    }
    return Result(metrics, curves, arrays, converged, tuple(notes))


def _highest(
    landscape: Landscape,
    theta: Tensor,
    ball: Ball,
    base: Tensor,
    rng: torch.Generator,
    ascents: Ascents,
) -> Result:
    """The worst case and SAM's step of one ball, with the rises on the way to both."""
    p = ball.prefix
    step, peaks = search(rise_in(landscape, theta, ball), theta, ball, rng, ascents)
    best = max(peaks, key=height)
    # The centre belongs to the ball: where nothing higher was reached, the rise is 0.
    e = best.x if best.value > 0 else torch.zeros_like(best.x)
    rises, to_worst = _line(landscape, theta, ball.scale * e, base)
    metrics, curves = _worst(p, rises, best, peaks), {f"{p}rise_along_worst": to_worst}
    notes = _doubts(f"{p}worst_case", best, peaks, ascents.max_gradients)
    if step is not None:
        rises, curves[f"{p}rise_along_sam"] = _line(landscape, theta, ball.scale * step, base)
        turned = sam.turning(landscape, theta, ball.scale, ball.radius, step)
        metrics[f"{p}sam_rise"] = _mean(rises, rises + turned)
    else:
        notes.append(f"{p}sam_rise: the gradient is 0, so SAM's step has no direction")
    converged = best.converged or best.settled
    return Result(metrics, curves, converged=converged, notes=tuple(notes))


def _doubts_on_batches(missed: int, left: int, m: int) -> list[str]:
    notes = []
    if missed:
        notes.append(f"m-sharpness: {missed} of the batches' ascents have not converged")
    if left:
        notes.append(f"m-sharpness leaves out {left} samples that do not fill a batch of {m}")
    return notes


def _doubts(name: str, best: Peak, peaks: list[Peak], max_gradients: int) -> list[str]:
    """Notes on the search for a worst case."""
    if not (best.converged or best.settled):
        return [
            f"{name}: not converged after {max_gradients} gradients, so it may be higher; raise "
            "max_gradients"
        ]
    notes = []
    if not best.converged:
        notes.append(
            f"{name}: the rise settled at a kink of the loss, where the gap of "
            f"{best.gap / best.value:.1%} cannot close"
        )
    if len(peaks) > 1 and sum(agreeing(peaks)) == 1:
        notes.append(
            f"{name}: only one of {len(peaks)} ascents reached it, so there may be higher ones; "
            "raise starts"
        )
    return notes


def _line(landscape: Landscape, theta: Tensor, step: Tensor, base: Tensor) -> tuple[Tensor, Curve]:
    """Per-sample rises at θ + step, and the mean rise on the way there."""
    means, errors, rises = [0.0], [0.0], torch.zeros_like(base)
    for fraction in FRACTIONS[1:].tolist():
        rises = landscape.influences(landscape.losses(theta + fraction * step)).double() - base
        means.append(rises.mean().item())
        errors.append(standard_error(rises).get("data", float("nan")))
    curve = Curve(FRACTIONS, np.array(means), "relative_distance", np.array(errors), y_unit="loss")
    return rises, curve


def _mean(rises: Tensor, influences: Tensor) -> Metric:
    return Metric(rises.mean().item(), "loss", standard_error(influences))


def _worst(prefix: str, rises: Tensor, best: Peak, peaks: list[Peak]) -> dict[str, Metric]:
    """The worst case, and how far its search can be trusted."""
    metric = _mean(rises, rises)  # at a maximum the rise does not change with the perturbation
    if not metric.value > 0:
        return {f"{prefix}worst_case": Metric(0.0, "loss")}
    as_high = agreeing(peaks)
    return {
        f"{prefix}worst_case": metric,
        f"{prefix}ascent_gap": Metric(best.gap / best.value),
        f"{prefix}ascent_agreement": Metric(sum(as_high) / len(as_high), "fraction"),
        f"{prefix}gradients": Metric(sum(peak.evaluations for peak in peaks)),
    }


def _average(
    landscape: Landscape,
    theta: Tensor,
    ball: Ball,
    base: Tensor,
    rng: torch.Generator,
    probes: int,
    report: Report,
) -> Metric:
    """Mean rise over pairs ±σTξ, ξ standard normal, with its errors over the pairs and the data."""
    total, means = torch.zeros_like(base), []
    for i in range(probes):
        step = ball.sigma * ball.scale * torch.randn(len(theta), generator=rng).to(theta)
        both = landscape.losses(theta + step).double() + landscape.losses(theta - step).double()
        rises = landscape.influences(both) / 2 - base
        means.append(rises.mean())
        total += rises / probes
        report(i + 1, probes, "average over random directions")
    spread = (torch.stack(means).std() / probes**0.5).item()
    return Metric(total.mean().item(), "loss", standard_error(total) | {"probes": spread})


def _on_batches(
    landscape: Landscape,
    theta: Tensor,
    balls: tuple[Ball, ...],
    rng: torch.Generator,
    m: int,
    ascents: Ascents,
) -> tuple[dict[str, Metric], int]:
    """Mean over batches of the worst case on each, and how many of the searches fell short."""
    drawn = torch.randperm(landscape.n_samples, generator=rng).to(landscape.device)
    batches = [landscape.subset(batch) for batch in drawn.split(m) if len(batch) == m]
    metrics, missed = {}, 0
    for ball in balls:
        values = []
        for batch in batches:
            rise = rise_in(batch, theta, ball)
            best = max(search(rise, theta, ball, rng, ascents)[1], key=height)
            values.append(max(best.value, 0.0))
            missed += not (best.converged or best.settled)
        heights = torch.tensor(values, dtype=torch.float64)
        metrics[f"{ball.prefix}m_sharpness"] = _mean(heights, heights)
    return metrics, missed
