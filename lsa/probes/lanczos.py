"""The Hessian spectrum: its ends, its density and where its negative part comes from."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from lsa.landscape import Landscape
from lsa.landscape.derivatives import budget
from lsa.maths.ratios import quotient
from lsa.maths.spectra import counts, eigenpairs
from lsa.maths.spectra.quadrature import Quadrature, spectral_density
from lsa.probe import (
    AtMost,
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
from lsa.runtime.errors import InputError

GRID = 211  # points of the density, from −1.05 to 1.05 of the largest |λ|
FEWEST = 4  # samples that have halves with an eigenvalue of their own


def _work(
    at: Sizes,
    *,
    k: int,
    k_min: int,
    tol: float,
    density_probes: int,
    density_steps: int,
    split: str,
    bias: str,
    **_: Any,
) -> Work:
    """Lanczos to both ends of H, and for the split of G and of H − G; halves, and the density."""
    d, n = at.dimension, at.samples
    splits, halves = int(split == "yes"), int(bias == "yes")
    one = counts.upper(1, tol, d, near=True), counts.upper(1, tol, d), counts.both(1, 1, tol, d)

    def of(searches: tuple[float, ...]) -> Work:
        ends, half, top, rest = searches
        steps = density_probes * density_steps
        rows = [lanczos_rows(ends), density_probes * lanczos_rows(density_steps)]
        rows += [2 * halves * lanczos_rows(half)]
        rows += [splits * lanczos_rows(products) for products in (top, rest)]
        return Work(
            gradients=4.0 * n,
            products=(ends + steps + halves * half + splits * rest) * n,
            gauss_newton=splits * (top + rest) * n,
            curvatures=(1.0 + (k_min > 0) + splits) * n,
            rows=sum(rows),
            vectors=lanczos_vectors(max(ends, splits * rest), at) + k + k_min,
        )

    return between(of, list(zip(counts.both(k, k_min, tol, d), *one, strict=True)))


@probe(
    headline=("lambda_max", "lambda_min", "condition_number", "trace", "n_outliers"),
    work=_work,
    compare=("lambda_max", "lambda_min", "condition_number", "trace"),
    check=(
        AtMost(
            "λ_min(H) {lambda_min:.4g} ≥ λ_min(H − G) {remainder_lambda_min:.4g}",
            "remainder_lambda_min",
            "lambda_min",
            relative=0.01,
        ),
    ),
    during=("lambda_max",),
    curve="density",
    caption="Density of the Hessian's eigenvalues, each checkpoint in units of its own largest "
    "|λ|: see where the bulk ends and whether there is mass below 0. The widths of two "
    "optimizers do not compare here; λ_max stands in the table.",
)
def lanczos(
    landscape: Landscape,
    theta: Tensor,
    rng: torch.Generator,
    report: Report,
    *,
    k: Annotated[int, "eigenvalues wanted at the upper end", Field(ge=1)] = 3,
    k_min: Annotated[int, "eigenvalues wanted at the lower end; 0 leaves it out", Field(ge=0)] = 1,
    tol: Annotated[float, "residual allowed, relative to the eigenvalue", Field(gt=0)] = 1e-3,
    max_products: Annotated[
        int, "Hessian products after which to stop unconverged", Field(ge=1)
    ] = 500,
    density_probes: Annotated[
        int, "random probes of the density; 0 leaves it out", Field(ge=0)
    ] = 5,
    density_steps: Annotated[int, "Lanczos steps per probe of the density", Field(ge=1)] = 40,
    split: Annotated[Literal["yes", "no"], "ends of the Gauss–Newton part and the rest"] = "yes",
    bias: Annotated[Literal["yes", "no"], "λ_max's bias, from halves of the samples"] = "yes",
) -> Result:
    """Hessian eigenvalues at both ends by Lanczos, the density, and the Gauss–Newton split.

    Ends: Lanczos with full reorthogonalisation and thick restart (Wu & Simon 2000), until the
    residual ‖Hv − λv‖ is within `tol` at both ends; the lower end takes most of the products. The
    condition number is |λ_max/λ_min|, as papers that compare optimizers print it. H is indefinite,
    so it is only a ratio of the two ends. It is left out where |λ_min| is within its residual or
    rounding. With a probability of 95 % no eigenvalue lies above `lambda_max_limit`
    (`lsa.maths.spectra.detection.excluded`). The standard error of an eigenvalue over the data is
    the spread of the per-sample curvatures vᵀ∇²ℓᵢv over √N (first-order perturbation theory). A
    subset of the data biases λ_max up and λ_min down (Jensen's inequality), by about b/N. So the
    mean λ_max of two random halves of the samples exceeds λ_max by as much as that exceeds the
    λ_max of infinitely many samples. `lambda_max_bias` is this difference.

    Density: stochastic Lanczos quadrature (Ghorbani, Krishnan & Xiao 2019). It also gives the
    trace, ‖H‖_F², the effective rank (tr H)²/‖H‖_F², the number of outliers above the bulk
    (`Quadrature.outliers`), and the shares of eigenvalues below zero and at zero (`sign_masses`; an
    eigenvalue nearer to zero than the steps resolve counts as zero). Standard errors are over the
    probes. Trace and norm are exact on the eigenvectors from above, with Hutchinson's bound as
    their error. Ghorbani et al. take 10 probes of 90 steps. 5 probes of 40 steps, enough for ten
    outliers, take a quarter of the products.

    Split: H = G + R, with G the positive semidefinite Gauss–Newton part (Schraudolph 2002) and R
    the rest, from which all negative curvature comes: λ_min(H) ≥ λ_min(R).
    """
    _check(landscape, k, k_min)
    hessian = landscape.hessian(theta)
    extremes = eigenpairs.lanczos(
        hessian,
        eigenpairs.start_vector(theta, rng, landscape.gradient(theta)),
        random=0.25,
        rng=rng,
        largest=k,
        smallest=k_min,
        tol=tol,
        max_products=max_products,
        basis=budget.basis(theta, k + k_min),
        report=report,
    )
    metrics, curves, arrays = _ends(landscape, theta, extremes)
    notes = extremes.shortfall("Hessian")
    if bias == "yes" and landscape.n_samples >= FEWEST:
        metrics["lambda_max_bias"] = _bias(landscape, theta, extremes, rng, tol, report, notes)
    lacking: list[str] = []
    if split == "yes":
        try:
            metrics |= _split(landscape, theta, hessian, rng, tol, max_products, report, notes)
        except InputError as error:
            lacking.append(f"the Gauss–Newton split is left out: {error}")
    converged = not notes
    notes += lacking
    notes += _without_condition_number(metrics)
    if density_probes:
        options = {"probes": density_probes, "steps": density_steps, "known": _pairs(extremes)}
        options |= {"dtype": theta.dtype, "device": theta.device, "report": report}
        rule = spectral_density(hessian, len(theta), rng=rng, **options)
        metrics |= _moments(rule)
        if metrics["n_outliers"].value == 0:
            notes.append("no outliers: no gap separates the top eigenvalues from the rest")
        curves["density"] = _density(rule)
        arrays |= {"density_nodes": rule.nodes.numpy(), "density_weights": rule.weights.numpy()}
    return Result(metrics, curves, arrays, converged, tuple(notes))


def _without_condition_number(metrics: dict[str, Metric]) -> list[str]:
    """Why there is no condition number, where there is none."""
    if "lambda_min" not in metrics:
        return ["the lower end was left out (k_min=0), and with it the condition number"]
    if "condition_number" in metrics:
        return []
    return [
        f"no condition number: λ_min={metrics['lambda_min'].value:.3g} is not told from zero "
        "by its residual and rounding"
    ]


def _check(landscape: Landscape, k: int, k_min: int) -> None:
    if k + k_min > landscape.dimension:
        raise InputError(
            f"k={k} and k_min={k_min} are together more than the landscape's dimension "
            f"d={landscape.dimension}; choose fewer"
        )


def _pairs(extremes: eigenpairs.Extremes) -> tuple[Tensor, Tensor]:
    """The eigenpairs that have converged."""
    ends = (extremes.largest, extremes.smallest)
    converged = torch.cat([pairs.converged for pairs in ends])
    values = torch.cat([pairs.values for pairs in ends])
    vectors = torch.cat([pairs.vectors for pairs in ends], dim=1)
    return values[converged], vectors[:, converged.to(vectors.device)]


def _ends(
    landscape: Landscape, theta: Tensor, extremes: eigenpairs.Extremes
) -> tuple[dict[str, Metric], dict[str, Curve], dict[str, np.ndarray]]:
    """Metrics, curve and arrays of the eigenpairs at both ends."""
    upper, lower = extremes.largest, extremes.smallest
    gradient = landscape.gradient(theta)
    vectors = torch.cat([upper.vectors, lower.vectors.flip(1)], dim=1)
    # An eigenvector has no sign; point it downhill, so that perturbations along it are comparable.
    vectors = vectors * torch.where(gradient @ vectors > 0, -1.0, 1.0)
    lambda_max, limit = upper.values[0].item(), extremes.limit
    values = torch.cat([upper.values, lower.values.flip(0)])
    residuals = torch.cat([upper.residuals, lower.residuals.flip(0)])
    top = landscape.influences(landscape.curvatures(theta, vectors[:, 0])).double()
    slope = landscape.influences(
        landscape.slopes(theta, torch.nn.functional.normalize(gradient, dim=0))
    )
    metrics = {
        "lambda_max": Metric(lambda_max, "loss", standard_error(top)),
        "lambda_max_residual": Metric(upper.residuals[0].item(), "loss"),
        "gradient_norm": Metric(gradient.double().norm().item(), "loss", standard_error(slope)),
        "products": Metric(extremes.products),
        "orthogonality_error": Metric(extremes.orthogonality),
        **({"lambda_max_limit": Metric(limit, "loss")} if np.isfinite(limit) else {}),
        "n_samples": Metric(landscape.n_samples),
    }
    k, k_min = len(upper.values), len(lower.values)
    if k_min:
        lambda_min = lower.values[0].item()
        bottom = landscape.influences(landscape.curvatures(theta, vectors[:, -1])).double()
        metrics |= {
            "lambda_min": Metric(lambda_min, "loss", standard_error(bottom)),
            "lambda_min_residual": Metric(lower.residuals[0].item(), "loss"),
        }
        if extremes.told_from_zero(smallest=True):
            metrics |= _condition(lambda_max, lambda_min, top, bottom)
    eigenvalues = Curve(
        x=np.concatenate([np.arange(1.0, k + 1), np.arange(-k_min, 0.0)]),
        y=values.cpu().numpy(),
        x_name="index",
        error=residuals.cpu().numpy(),
        y_unit="loss",
    )
    arrays = {"eigenvectors": vectors.cpu().numpy(), "eigenvalues": values.cpu().numpy()}
    return metrics, {"eigenvalue": eigenvalues}, arrays


def _condition(
    lambda_max: float, lambda_min: float, top: Tensor, bottom: Tensor
) -> dict[str, Metric]:
    """|λ_max/λ_min|, its interval from the per-sample curvatures along both eigenvectors."""
    values = {"condition_number": abs(lambda_max / lambda_min)}
    if len(top) > 2:
        signs = math.copysign(1, lambda_max), math.copysign(1, lambda_min)
        over, under = (
            sign * (value + each - each.mean())
            for sign, value, each in zip(
                signs, (lambda_max, lambda_min), (top, bottom), strict=True
            )
        )
        values = quotient(over, under).named("condition_number") | values
    return {name: Metric(value) for name, value in values.items()}


def _bias(
    landscape: Landscape,
    theta: Tensor,
    extremes: eigenpairs.Extremes,
    rng: torch.Generator,
    tol: float,
    report: Report,
    notes: list[str],
) -> Metric:
    """Mean λ_max of two random halves of the samples, less that of all."""
    pairs = extremes.largest
    halves = torch.randperm(landscape.n_samples, generator=rng).to(landscape.device)
    tops = []
    for half in halves.tensor_split(2):
        ends = eigenpairs.top(
            landscape.subset(half).hessian(theta),
            1,
            theta,
            rng=rng,
            near=pairs.vectors[:, 0],
            tol=tol,
            basis=budget.basis(theta, 1),
            report=report,
        )
        notes.extend(ends.shortfall("half of the samples"))
        tops.append(ends.largest.values[0])
    return Metric((torch.stack(tops).mean() - pairs.values[0]).item(), "loss")


def _split(
    landscape: Landscape,
    theta: Tensor,
    hessian: eigenpairs.Matvec,
    rng: torch.Generator,
    tol: float,
    max_products: int,
    report: Report,
    notes: list[str],
) -> dict[str, Metric]:
    """λ_max of the Gauss–Newton part G and λ_min of the remainder R = H − G."""
    gauss_newton = landscape.gauss_newton(theta)

    def extreme(
        matvec: eigenpairs.Matvec, largest: int, smallest: int, name: str
    ) -> tuple[float, Tensor]:
        extremes = eigenpairs.lanczos(
            matvec,
            eigenpairs.start_vector(theta, rng),
            rng=rng,
            largest=largest,
            smallest=smallest,
            tol=tol,
            max_products=max_products,
            basis=budget.basis(theta, 1),
            report=report,
        )
        notes.extend(extremes.shortfall(name))
        pairs = extremes.largest if largest else extremes.smallest
        return pairs.values[0].item(), pairs.vectors[:, 0]

    top, u = extreme(gauss_newton, 1, 0, "Gauss–Newton part")
    bottom, v = extreme(lambda v: hessian(v) - gauss_newton(v), 0, 1, "remainder")
    of_u = landscape.influences(landscape.gauss_newton_curvatures(theta, u))
    rest = landscape.curvatures(theta, v) - landscape.gauss_newton_curvatures(theta, v)
    of_v = landscape.influences(rest)
    return {
        "gauss_newton_lambda_max": Metric(top, "loss", standard_error(of_u)),
        "remainder_lambda_min": Metric(bottom, "loss", standard_error(of_v)),
    }


def _moments(rule: Quadrature) -> dict[str, Metric]:
    """Metrics of the quadrature: trace, norm, rank, outliers and signs."""
    outliers, signs = rule.outliers(), rule.signs
    estimates = {
        "trace": (rule.trace, "loss"),
        "frobenius_squared": (rule.frobenius_squared, "loss²"),
        "effective_rank": (rule.effective_rank, ""),
        "n_outliers": (outliers.count, ""),
        "bulk_edge": (outliers.edge, "loss"),
        "negative_share": (signs.negative, ""),
        "zero_share": (signs.zero, ""),
    }
    # Other random vectors say little of the bulk's end, which is read off by a rule about gaps.
    known = {name for name, (e, _) in estimates.items() if e.samples > 1} - {"bulk_edge"}
    return {
        name: Metric(e.value, unit, {"probes": e.error} if name in known else {})
        for name, (e, unit) in estimates.items()
        if np.isfinite(e.value)
    }


def _density(rule: Quadrature) -> Curve:
    """Density against λ in units of the largest |λ|: a grid on which all checkpoints overlay."""
    scale = rule.nodes.abs().max().item() or 1.0
    width = (rule.nodes.max() - rule.nodes.min()).item() / rule.nodes.shape[1] or 1e-3 * scale
    density = rule.density(-1.05 * scale, 1.05 * scale, width=width, points=GRID)
    return Curve(
        x=np.linspace(-1.05, 1.05, GRID),
        y=(density.value * scale).numpy(),
        x_name="relative_eigenvalue",
        error=(density.error * scale).numpy() if len(rule.nodes) > 1 else None,
    )
