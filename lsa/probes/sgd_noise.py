"""The noise of stochastic gradients against the curvature that it meets."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from lsa.landscape import Landscape
from lsa.maths.spectra import eigenpairs
from lsa.maths.spectra.moments import ProductMoments, product_moments
from lsa.probe import Curve, Metric, Report, Result, Sizes, Work, probe, standard_error
from lsa.runtime.errors import InputError

BRACKET = 0.1  # width of the bracket of λ_C, relative, above which a note says so
# Products of a Lanczos run to the upper end, first pair and each further one, as seen for networks
# trained by SGD and AdamW; H of one of them took twice as many. For the estimate of the cost.
FIRST, FURTHER = 10, 3
SPREAD = (0.9, 1.6)


def _work(at: Sizes, *, k: int, probes: int, **_: Any) -> Work:
    """Lanczos on H, on C and on two halves of C, then two products per probe and basis vector."""
    moments = 2 * k + probes if probes else 0
    search = FIRST + FURTHER * (k - 1)
    return Work(
        gradients=17.0 * at.samples,  # with slopes, in their place
        products=(search + moments) * at.samples,
        covariance=(search + FIRST + moments) * at.samples,  # whole, and two halves
        curvatures=1.0 * at.samples,
        vectors=4 * search,
        spread=SPREAD,
    )


@probe(headline=("lambda_h", "lambda_c", "noise_ratio"), work=_work)
def sgd_noise(
    landscape: Landscape,
    theta: Tensor,
    rng: torch.Generator,
    report: Report,
    start: Tensor | None = None,
    *,
    k: Annotated[int, "top eigenvectors of each operator to find and compare"] = 5,
    tol: Annotated[float, "residual allowed, relative to the eigenvalue"] = 1e-3,
    max_products: Annotated[int, "products per operator after which to stop unconverged"] = 500,
    probes: Annotated[int, "random vectors for tr(HC) and the alignment; 0 leaves them out"] = 10,
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
    2018) is a number of samples, unbiased for |G|², and knows no batch size.
    """
    n = landscape.n_samples
    if not 1 <= k <= landscape.dimension or probes < 0 or probes == 1 or n < 4:
        raise InputError(
            f"k={k}, probes={probes}, {n} samples: choose 1 ≤ k ≤ d={landscape.dimension}, "
            "2 probes or more (or 0) and 4 samples or more"
        )
    notes: list[str] = []

    def top(
        matvec: eigenpairs.Matvec, pairs: int, name: str, near: Tensor | None = None
    ) -> eigenpairs.Eigenpairs:
        found = eigenpairs.top(
            matvec,
            pairs,
            theta,
            rng=rng,
            near=near,
            tol=tol,
            max_products=max_products,
            report=report,
        )
        notes.extend(found.shortfall(name))
        return found.largest

    hessian, (covariance, gradient) = landscape.hessian(theta), landscape.covariance_and_mean(theta)
    near = gradient if start is None else start
    H, C = top(hessian, k, "Hessian", near), top(covariance, k, "covariance", start)
    converged = not notes
    moments = None
    if probes:
        basis = torch.linalg.qr(torch.cat([H.vectors, C.vectors], dim=1))[0]
        moments = product_moments(hessian, covariance, basis, rng=rng, probes=probes, report=report)
    halves = torch.randperm(n, generator=rng).to(landscape.x.device).tensor_split(2)
    held_out = [
        _variance(landscape.subset(other), theta, top(half, 1, "half", mean).vectors[:, 0])
        for one, other in (halves, halves[::-1])
        for half, mean in [landscape.subset(one).covariance_and_mean(theta)]
    ]
    metrics = _ratio(landscape, theta, H, C) | _traces(landscape, theta, notes)
    if moments:
        metrics |= _alignment(moments, metrics, landscape.dimension)
    naive, split = metrics["lambda_c"].value, sum(held_out) / 2
    metrics |= {
        "lambda_c_split": Metric(split, "loss²"),
        "subspace_overlap": Metric(eigenpairs.subspace_overlap(C.vectors, H.vectors)),
        "top_cosine_squared": Metric(float(C.vectors[:, 0] @ H.vectors[:, 0]) ** 2),
        "n_samples": Metric(n),
    }
    if naive - split > BRACKET * naive:
        notes.append(
            f"λ_C lies between {split:.4g} (direction from one half, variance from the other) and "
            f"{naive:.4g} (both from all {n} samples); more samples narrow the bracket"
        )
    noise = torch.tensor([_variance(landscape, theta, v) for v in H.vectors.T])
    curves = {
        name: Curve(np.arange(1.0, k + 1), y.double().cpu().numpy(), "index", y_unit=unit)
        for name, y, unit in (
            ("hessian_eigenvalue", H.values, "loss"),
            ("covariance_eigenvalue", C.values, "loss²"),
            ("noise_on_hessian_vector", noise, "loss²"),
        )
    }
    arrays = {
        "hessian_vectors": H.vectors.cpu().numpy(),
        "covariance_vectors": C.vectors.cpu().numpy(),
    }
    return Result(metrics, curves, arrays, converged, tuple(notes))


def _variance(landscape: Landscape, theta: Tensor, u: Tensor) -> float:
    """uᵀCu: variance of the per-sample slopes along u."""
    return landscape.slopes(theta, u).double().var(correction=0).item()


def _ratio(
    landscape: Landscape, theta: Tensor, H: eigenpairs.Eigenpairs, C: eigenpairs.Eigenpairs
) -> dict[str, Metric]:
    """The top eigenvalues and their ratio, with errors by first-order perturbation."""
    v = H.vectors[:, 0]
    curvatures = landscape.curvatures(theta, v).double()
    along_c = landscape.slopes(theta, C.vectors[:, 0]).double()
    along_h = landscape.slopes(theta, v).double()
    squares_c = (along_c - along_c.mean()).square()
    squares_h = (along_h - along_h.mean()).square()
    h, c = H.values[0].item(), C.values[0].item()
    influence = squares_c / h - c / h**2 * curvatures
    return {
        "lambda_h": Metric(h, "loss", standard_error(curvatures)),
        "lambda_c": Metric(c, "loss²", standard_error(squares_c)),
        "noise_ratio": Metric(c / h, "loss", standard_error(influence)),
        "noise_on_top_curvature": Metric(
            squares_h.mean().item(), "loss²", standard_error(squares_h)
        ),
    }


def _traces(landscape: Landscape, theta: Tensor, notes: list[str]) -> dict[str, Metric]:
    """tr C exactly, |G|² without the bias that the noise of g adds to |g|², and their ratio."""
    g = landscape.gradient(theta).double()
    squares, slopes = [], []
    for block in landscape.sample_gradients(theta):
        centred = block.double() - g
        squares.append(centred.square().sum(1))
        slopes.append(centred @ g)
    square, slope = torch.cat(squares), torch.cat(slopes)
    n = len(square)
    trace = square.mean().item()
    unbiased = trace * n / (n - 1)
    signal = float(g @ g) - unbiased / n
    found = {
        "trace_c": Metric(trace, "loss²", standard_error(square)),
        "gradient_squared": Metric(signal, "loss²", standard_error(2 * slope)),
    }
    if signal > 0:
        influence = square / signal - 2 * trace / signal**2 * slope
        found["noise_scale"] = Metric(unbiased / signal, "samples", standard_error(influence))
    else:
        notes.append("the mean gradient is not told from zero, so there is no noise scale")
    return found


def _alignment(
    moments: ProductMoments, known: dict[str, Metric], dimension: int
) -> dict[str, Metric]:
    """What the random vectors tell of H and C together."""
    isotropic = known["trace_c"].value / dimension  # the variance in each direction, were all alike
    found = {
        "trace_hc": (moments.trace_ab, "loss³"),
        "trace_h": (moments.trace_a, "loss"),
        "norm_h": (moments.norm_a, "loss"),
        "norm_c": (moments.norm_b, "loss²"),
        "alignment": (moments.alignment, ""),
    }
    metrics = {name: Metric(e.value, u, {"probes": e.error}) for name, (e, u) in found.items()}
    if isotropic > 0 and moments.trace_a.value > 0:
        gain = moments.mean_b.value / isotropic
        spread = moments.mean_b.error / isotropic
        metrics["anisotropy_gain"] = Metric(gain, "", {"probes": spread})
    return metrics
