"""The ends of the Hessian spectrum."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from lsa import linalg
from lsa.errors import InputError
from lsa.landscape import Landscape
from lsa.probe import Curve, Metric, Report, Result, probe


@probe(headline=("lambda_max", "lambda_min"))
def lanczos(
    landscape: Landscape,
    theta: Tensor,
    rng: torch.Generator,
    report: Report,
    *,
    k: Annotated[int, "eigenvalues wanted at the upper end"] = 3,
    k_min: Annotated[int, "eigenvalues wanted at the lower end"] = 1,
    tol: Annotated[float, "residual allowed, relative to the eigenvalue"] = 1e-3,
    max_products: Annotated[int, "Hessian products after which to stop unconverged"] = 500,
) -> Result:
    """Largest and smallest Hessian eigenvalues by Lanczos, with residuals and data error.

    Full reorthogonalisation and thick restart (Wu & Simon 2000), run until the residual
    ‖Hv − λv‖ is within `tol` at both ends. The condition number is |λ_max/λ_min|, as the
    literature on optimizer comparisons prints it; H is indefinite, so it is a ratio of the two
    ends and not a conditioning of anything. The standard error of an eigenvalue over the data is
    the spread of the per-sample curvatures vᵀ∇²ℓᵢv over √N (first-order perturbation theory).
    A subset of the data biases λ_max up and λ_min down.
    """
    if k < 1 or k_min < 1 or k + k_min > landscape.dimension:
        raise InputError(
            f"k={k}, k_min={k_min} must be at least 1 and together at most the "
            f"landscape's dimension d={landscape.dimension}; choose fewer"
        )
    hessian = landscape.hessian(theta)
    start = torch.randn(len(theta), generator=rng).to(theta)
    found = linalg.lanczos(
        hessian,
        start,
        rng=rng,
        largest=k,
        smallest=k_min,
        tol=tol,
        max_products=max_products,
        report=report,
    )
    upper, lower = found.largest, found.smallest
    gradient = landscape.gradient(theta)
    vectors = torch.cat([upper.vectors, lower.vectors.flip(1)], dim=1)
    # An eigenvector has no sign; point it downhill, so that perturbations along it are comparable.
    vectors = vectors * torch.where(gradient @ vectors > 0, -1.0, 1.0)
    lambda_max, lambda_min = upper.values[0].item(), lower.values[0].item()
    values = torch.cat([upper.values, lower.values.flip(0)])
    residuals = torch.cat([upper.residuals, lower.residuals.flip(0)])
    metrics = {
        "lambda_max": Metric(lambda_max, "loss", _data_error(landscape, theta, vectors[:, 0])),
        "lambda_max_residual": Metric(upper.residuals[0].item(), "loss"),
        "lambda_min": Metric(lambda_min, "loss", _data_error(landscape, theta, vectors[:, -1])),
        "lambda_min_residual": Metric(lower.residuals[0].item(), "loss"),
        "condition_number": Metric(abs(lambda_max / lambda_min) if lambda_min else float("inf")),
        "gradient_norm": Metric(gradient.double().norm().item(), "loss"),
        "products": Metric(found.products),
        "orthogonality_error": Metric(found.orthogonality),
        "n_samples": Metric(landscape.n_samples),
    }
    index = np.concatenate([np.arange(1, k + 1), np.arange(-k_min, 0)])
    eigenvalues = Curve(
        x=index.astype(float),
        y=values.cpu().numpy(),
        x_name="index",
        error=residuals.cpu().numpy(),
        y_unit="loss",
    )
    notes = () if found.converged else (_unconverged(found, tol, max_products),)
    arrays = {"eigenvectors": vectors.cpu().numpy(), "eigenvalues": values.cpu().numpy()}
    return Result(metrics, {"eigenvalue": eigenvalues}, arrays, found.converged, notes)


def _data_error(landscape: Landscape, theta: Tensor, v: Tensor) -> dict[str, float]:
    """Standard error of vᵀHv over the samples."""
    if landscape.n_samples < 2:
        return {}
    curvatures = landscape.curvatures(theta, v).double()
    return {"data": (curvatures.std() / landscape.n_samples**0.5).item()}


def _unconverged(found: linalg.Extremes, tol: float, max_products: int) -> str:
    worst = max(found.largest.residuals.max().item(), found.smallest.residuals.max().item())
    return (
        f"not converged: a residual is still {worst:.3g} after {found.products} products "
        f"(tolerance {tol:g}); raise max_products={max_products} or tol"
    )
