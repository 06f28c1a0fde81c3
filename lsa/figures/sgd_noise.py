"""Gradient noise against curvature: the top eigenvalues of both, and one along the other."""

from __future__ import annotations

from matplotlib.figure import Figure

from lsa.figures.axes import A, B, axes
from lsa.probe import Result


def draw(result: Result, title: str) -> Figure:
    """Top eigenvalues of H and C, and the noise along the sharpest directions."""
    figure, (left, right) = axes(f"{title}: gradient noise and curvature", 2)
    hessian = result.curves["hessian_eigenvalue"]
    covariance = result.curves["covariance_eigenvalue"]
    left.semilogy(hessian.x, hessian.y, "o-", color=A, label="Hessian H (loss)")
    left.semilogy(covariance.x, covariance.y, "s-", color=B, label="noise covariance C (loss²)")
    for name, colour in (("lambda_h", A), ("lambda_c", B)):
        metric = result.metrics[name]
        error = 2 * metric.errors["data"]
        low = min(error, 0.9 * metric.value)  # a log axis has no room for less
        left.errorbar(1, metric.value, yerr=[[low], [error]], color=colour, capsize=4)
    split = result.metrics["lambda_c_split"].value
    left.plot(1, split, "_", color=B, markersize=14, label=f"λ_C across halves: {split:.3g}")
    ratio = result.metrics["noise_ratio"]
    left.plot([], [], " ", label=f"λ_C/λ_H = {ratio.value:.3g} ± {2 * ratio.errors['data']:.2g}")
    left.set_xticks(hessian.x)
    left.set_xlabel(f"index; ±2 standard errors over {result.metrics['n_samples'].value:g} samples")
    left.set_ylabel("eigenvalue")
    left.legend()

    noise = result.curves["noise_on_hessian_vector"]
    right.loglog(hessian.y, noise.y, "o", color=A, label="Hessian eigenvectors v")
    slope = result.metrics["noise_ratio"].value
    ends = [hessian.y.min(), hessian.y.max()]
    right.plot(ends, [slope * x for x in ends], "--", color="grey", label="C = (λ_C/λ_H) H")
    if alignment := result.metrics.get("alignment"):
        text = f"alignment of H and C: {alignment.value:.3g} ± {2 * alignment.errors['probes']:.1g}"
        right.plot([], [], " ", label=text)
    right.set_xlabel("curvature vᵀHv (loss)")
    right.set_ylabel("gradient noise vᵀCv (loss²)")
    right.legend()
    return figure
