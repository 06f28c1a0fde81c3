"""The noise of stochastic gradients against the curvature that it meets."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from lsa.landscape import Landscape, noise_scale
from lsa.landscape.derivatives import budget
from lsa.maths.spectra import counts
from lsa.maths.spectra.eigenpairs import Eigenpairs, Extremes, top
from lsa.maths.spectra.krylov import Matvec, orthonormal
from lsa.maths.spectra.moments import ProductMoments, product_moments
from lsa.maths.spectra.overlap import subspace_overlap
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
from lsa.runtime.errors import InputError

BRACKET = 0.1  # width of the bracket of λ_C, relative, above which a note says so
TOLD = 2.0  # standard errors from which a denominator is told from zero
OF_C = (  # numbers that C has none of where it is zero
    "noise_ratio",
    "noise_scale",
    "noise_scale_low",
    "noise_scale_high",
    "norm_c",
    "alignment",
    "anisotropy_gain",
    "subspace_overlap",
    "top_cosine_squared",
)


def _work(at: Sizes, *, k: int, probes: int, tol: float, **_: Any) -> Work:
    """Lanczos on H, on C and on two halves of C, then two products per probe and basis vector."""
    moments = 2 * k + probes if probes else 0
    of_h, of_half = (counts.upper(n, tol, at.dimension, near=True) for n in (k, 1))
    of_c = counts.upper(k, tol, at.dimension)

    def of(searches: tuple[float, float, float]) -> Work:
        h, c, half = searches
        return Work(
            gradients=17.0 * at.samples,  # with slopes, in their place
            products=(h + moments) * at.samples,
            covariance=(c + half + moments + 1) * at.samples,  # both halves are one whole
            curvatures=3.0 * at.samples,
            rows=lanczos_rows(h) + lanczos_rows(c) + 2 * lanczos_rows(half),
            vectors=lanczos_vectors(max(searches), at) + 6 * k,
        )

    return between(of, list(zip(of_h, of_c, of_half, strict=True)))


@probe(
    headline=("lambda_h", "lambda_c", "noise_ratio", "noise_scale"),
    work=_work,
    compare=("lambda_h", "lambda_c", "noise_ratio"),
    check=(
        Same("λ_max", "lambda_h", "lanczos/lambda_max", within=0.01),
        Same("tr H", "trace_h", "lanczos/trace"),
    ),
    during=("lambda_c", "noise_ratio"),
    curve="covariance_eigenvalue",
    caption="Top eigenvalues of the covariance C of the per-sample gradients at every checkpoint. "
    "A larger eigenvalue is no larger noise in the steps: the learning rate, batch size and "
    "momentum enter there.",
)
def sgd_noise(
    landscape: Landscape,
    theta: Tensor,
    rng: torch.Generator,
    report: Report,
    *,
    k: Annotated[int, "top eigenvectors of each operator to find and compare", Field(ge=1)] = 5,
    tol: Annotated[float, "residual allowed, relative to the eigenvalue", Field(gt=0)] = 1e-3,
    max_products: Annotated[int, "products per operator that end the search", Field(ge=1)] = 500,
    probes: Annotated[int, "random vectors for tr(HC) and the alignment; or 0", Field(ge=0)] = 10,
) -> Result:
    """Gradient noise against curvature: λ_C/λ_H, tr(HC), alignment and the noise scale.

    C = 1/N ∑ᵢ (gᵢ−g)(gᵢ−g)ᵀ is the centred covariance of the per-sample gradients over the whole
    split, not of mini-batches: a batch of B drawn with replacement has C/B. Its eigenvalues come
    from the same Lanczos as the Hessian's, one pass over the data per product.

    λ_C is biased: the top eigenvector is fitted to the same samples (by about tr C/N upwards). So
    it is bracketed: `lambda_c` is that naive value, `lambda_c_split` takes the direction from one
    half of the samples and the variance along it from the other, which errs downwards.
    noise_ratio = λ_C/λ_H has the unit of the loss. Its standard error over the data is first-order
    (the spread of per-sample influences), and covers the bias of neither.

    alignment = tr(HC)/(‖H‖_F ‖C‖_F) is 1 where C ∝ H, as at a well-specified optimum;
    anisotropy_gain = tr(HC) / (tr H tr C/d) compares the curvature that the noise meets with that
    of isotropic noise of equal size (Zhu et al. 2019). noise_scale = tr C/|G|² (McCandlish et al.
    2018) is a number of samples, with |G|² unbiased, and depends on no batch size. Its 95 %
    interval, `noise_scale_low` to `noise_scale_high`, is not symmetric (Fieller 1954, corrected for
    skewness), and has only a lower end where |G|² is not told from zero.

    A ratio is left out where its denominator is not told from zero: |G|² by that interval, tr H
    within two standard errors, λ_H within its residual or rounding, C where the gradients of all
    samples are alike.
    """
    _check(landscape, k, probes)
    notes: list[str] = []

    def search(matvec: Matvec, pairs: int, name: str, near: Tensor | None) -> Extremes:
        options = {"tol": tol, "max_products": max_products, "report": report}
        options["basis"] = budget.basis(theta, pairs)
        ends = top(matvec, pairs, theta, rng=rng, near=near, **options)
        notes.extend(ends.shortfall(name))
        return ends

    hessian, (covariance, gradient) = landscape.hessian(theta), landscape.covariance_and_mean(theta)
    H = search(hessian, k, "Hessian", gradient)
    C = search(covariance, k, "covariance", None)
    moments = None
    if probes:
        basis = orthonormal(torch.cat([H.largest.vectors.T, C.largest.vectors.T])).T
        moments = product_moments(hessian, covariance, basis, rng=rng, probes=probes, report=report)
    held_out = _held_out(landscape, theta, rng, search)
    converged = not notes
    traces, alike = _traces(landscape, theta, C.largest, notes)
    metrics = _tops(landscape, theta, H, C) | traces
    metrics["n_samples"] = Metric(landscape.n_samples)
    if moments:
        metrics |= _alignment(moments, metrics, landscape.dimension)
    metrics |= {
        "lambda_c_split": Metric(held_out, "loss²"),
        "subspace_overlap": Metric(subspace_overlap(C.largest.vectors, H.largest.vectors)),
        "top_cosine_squared": Metric(float(C.largest.vectors[:, 0] @ H.largest.vectors[:, 0]) ** 2),
    }
    if "noise_ratio" not in metrics:
        notes.append("λ_H is not told from zero, so there is no noise ratio")
    if alike:
        notes.append(
            "the gradients of all samples are alike: C is zero, and its ratios are left out"
        )
        metrics = {name: m for name, m in metrics.items() if name not in OF_C}
    else:
        notes += _bracket(metrics, landscape.n_samples)
    arrays = {
        "hessian_vectors": H.largest.vectors.cpu().numpy(),
        "covariance_vectors": C.largest.vectors.cpu().numpy(),
    }
    curves = _curves(landscape, theta, H.largest, C.largest)
    return Result(metrics, curves, arrays, converged, tuple(notes))


def _check(landscape: Landscape, k: int, probes: int) -> None:
    if not landscape.has_samples:
        raise InputError(
            "gradient noise needs the losses of single samples, and the objective gives none; set "
            "Terms.samples, or take a probe of the loss alone: lanczos, sharpness, …"
        )
    n = landscape.n_samples
    if k > landscape.dimension or probes == 1 or n < 4:
        raise InputError(
            f"k={k}, probes={probes}, {n} samples: choose 1 ≤ k ≤ d={landscape.dimension}, "
            "2 probes or more (or 0) and 4 samples or more"
        )


def _held_out(
    landscape: Landscape,
    theta: Tensor,
    rng: torch.Generator,
    search: Callable[..., Extremes],
) -> float:
    """λ_C with its direction from one half of the samples and the variance from the other."""
    halves = torch.randperm(landscape.n_samples, generator=rng).to(landscape.device)
    parts = [landscape.subset(half) for half in halves.tensor_split(2)]
    variances = []
    for part, other in (parts, parts[::-1]):
        covariance, mean = part.covariance_and_mean(theta)
        u = search(covariance, 1, "half", mean).largest.vectors[:, 0]
        variances.append(_variance(other, theta, u))
    return sum(variances) / 2


def _bracket(metrics: dict[str, Metric], n: int) -> list[str]:
    """A note where the two values of λ_C lie far apart."""
    naive, split = metrics["lambda_c"].value, metrics["lambda_c_split"].value
    if naive - split <= BRACKET * naive:
        return []
    return [
        f"λ_C lies between {split:.4g} (direction from one half, variance from the other) and "
        f"{naive:.4g} (both from all {n} samples); more samples narrow the bracket"
    ]


def _curves(landscape: Landscape, theta: Tensor, H: Eigenpairs, C: Eigenpairs) -> dict[str, Curve]:
    noise = torch.tensor([_variance(landscape, theta, v) for v in H.vectors.T])
    index = np.arange(1.0, len(noise) + 1)
    return {
        name: Curve(index, y.double().cpu().numpy(), "index", y_unit=unit)
        for name, y, unit in (
            ("hessian_eigenvalue", H.values, "loss"),
            ("covariance_eigenvalue", C.values, "loss²"),
            ("noise_on_hessian_vector", noise, "loss²"),
        )
    }


def _variance(landscape: Landscape, theta: Tensor, u: Tensor) -> float:
    """uᵀCu: variance of the per-sample slopes along u."""
    return landscape.slopes(theta, u).double().var(correction=0).item()


def _tops(landscape: Landscape, theta: Tensor, H: Extremes, C: Extremes) -> dict[str, Metric]:
    """The top eigenvalues and their ratio, with errors by first-order perturbation."""
    v = H.largest.vectors[:, 0]
    curvatures = landscape.influences(landscape.curvatures(theta, v)).double()
    squares_c = _squares(landscape, theta, C.largest.vectors[:, 0])
    squares_h = _squares(landscape, theta, v)
    h, c = H.largest.values[0].item(), C.largest.values[0].item()
    metrics = {
        "lambda_h": Metric(h, "loss", standard_error(curvatures)),
        "lambda_c": Metric(c, "loss²", standard_error(squares_c)),
        "noise_on_top_curvature": Metric(
            squares_h.mean().item(),
            "loss²",
            standard_error(squares_h + _turning(landscape, theta, H.largest)),
        ),
    }
    if H.told_from_zero():
        influence = squares_c / h - c / h**2 * curvatures
        metrics["noise_ratio"] = Metric(c / h, "loss", standard_error(influence))
    return metrics


def _turning(landscape: Landscape, theta: Tensor, H: Eigenpairs) -> Tensor:
    """What each sample adds to vᵀCv `(N,)` by turning the top eigenvector v of H, to first order.

    v moves by (λ₁ − H)⁺Hᵢv, so vᵀCv by 2wᵀHᵢv with w = (λ₁ − H)⁺Cv. Outside of the known
    eigenvectors H counts as zero there. Without it two standard errors hold the number in 88 %.
    """
    v, values = H.vectors[:, 0], H.values.to(H.vectors)
    across = landscape.covariance(theta)(v)
    across = across - v * (v @ across)
    others = H.vectors[:, 1:]
    parts = others.T @ across
    gaps = (values[0] - values[1:]).clamp(min=1e-6 * float(values[0].abs()))
    w = others @ (parts / gaps - parts / values[0]) + across / values[0]
    if not (values[0] > 0 and 0 < float(w.norm()) < math.inf):
        return v.new_zeros((), dtype=torch.float64)
    w = w * (length := 1 / w.norm())
    plus, minus = (landscape.curvatures(theta, v + sign * w) for sign in (1, -1))
    return landscape.influences(plus - minus).double() / (2 * length)


def _squares(landscape: Landscape, theta: Tensor, u: Tensor) -> Tensor:
    """Squared deviations `(N,)` of the per-sample slopes along u, whose mean is uᵀCu."""
    slopes = landscape.slopes(theta, u).double()
    return (slopes - slopes.mean()).square()


def _traces(
    landscape: Landscape, theta: Tensor, C: Eigenpairs, notes: list[str]
) -> tuple[dict[str, Metric], bool]:
    """tr C exactly, |G|² without the bias that the noise of g adds to |g|², and their quotient.

    And whether tr C is no more than rounding.
    """
    g = landscape.gradient(theta).double()
    squares, slopes = [], []
    for block in landscape.sample_gradients(theta):
        centred = block.double() - g
        squares.append(centred.square().sum(1))
        slopes.append(centred @ g)
    square, slope = torch.cat(squares), torch.cat(slopes)
    n, size = len(square), float(g @ g)
    trace = square.mean().item()
    # Products with C subtract g gᵀ, so they know C only to the rounding of |g|².
    alike = trace <= 10 * torch.finfo(theta.dtype).eps * (trace + size)
    products = n * (slope + size), square + 2 * slope + size  # gᵢ·∑gⱼ and |gᵢ|²
    noise = noise_scale.of_sums(*products, 1, n, _spread(C, trace))
    signal = noise.gradient_squared.value
    metrics = {
        "trace_c": Metric(trace, "loss²", standard_error(square)),
        "gradient_squared": Metric(signal, "loss²", standard_error(2 * slope)),
    }
    scale = {k: Metric(v, "samples") for k, v in noise.scale.named("noise_scale").items()}
    if not noise.scale.bounded:
        text = "the mean gradient is not told from zero, so there is no noise scale"
        low = noise.scale.low
        known = not alike and 0 < low < math.inf
        notes.append(text + (f": it is above {low:.2g} samples" if known else ""))
        scale = scale if known else {}
    return metrics | scale, alike


def _spread(C: Eigenpairs, trace: float) -> noise_scale.Spread:
    """Bounds for the covariance, of which the top eigenvalues and the trace are known."""
    top = C.values.double()
    rest = max(0.0, trace - float(top.sum()))
    return noise_scale.Spread(float(top[0]), float(top.square().sum()) + float(top[-1]) * rest)


def _alignment(
    moments: ProductMoments, known: dict[str, Metric], dimension: int
) -> dict[str, Metric]:
    """Moments of H and C together."""
    isotropic = known["trace_c"].value / dimension  # the variance in each direction, were all alike
    estimates = {
        "trace_hc": (moments.trace_ab, "loss³"),
        "trace_h": (moments.trace_a, "loss"),
        "norm_h": (moments.norm_a, "loss"),
        "norm_c": (moments.norm_b, "loss²"),
        "alignment": (moments.alignment, ""),
    }
    metrics = {
        name: Metric(estimate.value, unit, {"probes": estimate.error})
        for name, (estimate, unit) in estimates.items()
        if math.isfinite(estimate.value)
    }
    trace = moments.trace_a
    if isotropic > 0 and trace.value > TOLD * trace.error:
        gain = moments.mean_b.value / isotropic
        spread = moments.mean_b.error / isotropic
        metrics["anisotropy_gain"] = Metric(gain, "", {"probes": spread})
    return metrics
