"""The curvature that the optimizer feels, against what its own steps can bear."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from lsa.landscape import Landscape
from lsa.landscape.derivatives import budget
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
from lsa.runtime.errors import InputError
from lsa.training import stability
from lsa.training.preconditioners import Preconditioner
from lsa.training.stability import OptimizerState

# Vectors for the estimate of the cost. Two are the optimizer's state. Those in float64 count twice:
# two of the preconditioner, one of the step and four of a product with P⁻¹H.
STATE = 16
SHARE = 0.5  # of the sharpness, that one sample carries, from which a note says so


def _work(at: Sizes, *, k: int, tol: float, **_: Any) -> Work:
    """Lanczos on H and P⁻¹H, a product of every mini-batch, and curvatures along three vectors.

    For SGD P⁻¹H is H.
    """
    raw = counts.upper(k, tol, at.dimension, near=True)
    felt = counts.Count(0, 0, 0) if at.optimizer == "SGD" else counts.upper(k, tol, at.dimension)

    def of(searches: tuple[float, float]) -> Work:
        return Work(
            gradients=2.0 * at.samples,
            products=(sum(searches) + 1.0) * at.samples,
            curvatures=3.0 * at.samples,
            rows=sum(map(lanczos_rows, searches)),
            vectors=lanczos_vectors(max(searches), at) + 2 * k + STATE,
        )

    return between(of, list(zip(raw, felt, strict=True)))


@probe(
    headline=("threshold_ratio", "batch_sharpness", "update_curvature"),
    work=_work,
    compare=("threshold_ratio", "batch_sharpness", "update_curvature"),
    check=(Same("λ_max", "lambda_max_raw", "lanczos/lambda_max", within=0.01),),
    during=("threshold_ratio", "batch_sharpness"),
    caption="Top eigenvalues of the Hessian itself. What compares optimizers is the table's share "
    "of the stability threshold: the sharpness that each feels over what its steps can bear.",
)
def preconditioned(
    landscape: Landscape,
    theta: Tensor,
    optimizer: OptimizerState | Optimizer,
    rng: torch.Generator,
    report: Report,
    *,
    k: Annotated[int, "top eigenvalues of H and of P⁻¹H to find", Field(ge=1)] = 3,
    tol: Annotated[float, "residual allowed, relative to the eigenvalue", Field(gt=0)] = 1e-3,
    max_products: Annotated[
        int, "products per operator after which to stop unconverged", Field(ge=1)
    ] = 500,
    batch_size: Annotated[
        int, "samples per training step; 0 takes the checkpoint's", Field(ge=0)
    ] = 0,
) -> Result:
    """Sharpness as the optimizer feels it: λ_max(P⁻¹H) against its own stability threshold.

    An optimizer that steps by −η P⁻¹m diverges on a quadratic where P⁻¹H, not H, is too sharp
    (Cohen et al. 2022, arXiv 2207.14484). The optimizer is a live one of torch over the landscape's
    model, or a checkpoint's. P is that of its last step: 1 for SGD, √v + ε for RMSprop, √∑g² + ε
    for Adagrad, (1 − β₁ᵗ)(√(v/(1 − β₂ᵗ)) + ε) for Adam and AdamW; `lsa.training` has those of the
    other optimizers, and `lsa.preconditioner` registers more. Where there is no P, as for Lion and
    SAM, the numbers without P remain and a note says why.

    sharpness is λ_max of the symmetric P^(−½)(H + λI)P^(−½), which has the eigenvalues of
    P⁻¹(H + λI), in units of 1/η; λ is the weight decay that is added to the gradient.
    threshold_ratio = sharpness over stability_threshold, with the learning rate of the last step:
    2/η, 2(1+β)/η for heavy ball, 2(1+β)/(η(1+2β)) for Nesterov, (2−ηλ)(1+β₁)/((1−β₁)η) for AdamW,
    whose λ is decoupled. Where groups have rates of their own, the rates are in P and the threshold
    is 1. The ratio is a diagnostic: exact for a quadratic, full batches and P at rest.

    update_curvature is uᵀHu/|u|² along the next step u that the optimizer makes from its state and
    the gradient over the measured samples. batch_sharpness is the mean of g_BᵀH_B g_B/|g_B|² over
    disjoint mini-batches B of the training's size (Andreyev & Beneventano 2024, arXiv 2412.20553).

    Standard errors over the data are first-order: P, u and the eigenvector stand still. That of
    batch_sharpness is the spread over the mini-batches. A subset of the data biases λ_max up.
    """
    if k > landscape.dimension:
        raise InputError(f"k={k}: choose 1 to d={landscape.dimension} eigenvalues")
    if not isinstance(optimizer, OptimizerState):
        optimizer = stability.read(optimizer, landscape.own_parameters)
    near = landscape.gradient(theta)
    limits = {"tol": tol, "max_products": max_products, "basis": budget.basis(theta, k)}
    find = partial(eigenpairs.top, rng=rng, near=near, report=report, **limits)
    hessian = landscape.hessian(theta)
    ends = find(hessian, k, theta)
    raw, notes = ends.largest, ends.shortfall("H")
    P, penalty = optimizer.preconditioner(theta), optimizer.penalty
    felt = None
    if optimizer.identity:
        felt = replace(raw, values=raw.values + penalty)
    elif P is not None:
        ends = find(_felt(hessian, P, penalty), k, theta)
        felt = ends.largest
        notes += ends.shortfall("P⁻¹H")
    converged = not notes

    size = batch_size or optimizer.batch_size
    metrics, curves, arrays = _raw(landscape, theta, raw)
    metrics |= {
        "learning_rate": Metric(optimizer.learning_rate),
        "n_samples": Metric(landscape.n_samples),
        **_update(landscape, theta, optimizer, notes),
        **_batch_sharpness(landscape, theta, size, rng, notes),
    }
    limit, formula = optimizer.threshold or (None, "none is known for these options")
    unit = "1/η" if optimizer.common else ""
    notes += [f"stability threshold of {optimizer.name}: {formula}", *optimizer.notes]
    if limit:
        metrics["stability_threshold"] = Metric(limit, unit)
    if P is None or felt is None:
        notes.append(optimizer.reason)
    else:
        metrics |= _sharpness(landscape, theta, P, felt, limit, unit, notes)
        curves["preconditioned_eigenvalue"] = _curve(felt.values, unit)
        arrays["preconditioned_vectors"] = felt.vectors.cpu().numpy()
    return Result(metrics, curves, arrays, converged, tuple(notes))


def _raw(
    landscape: Landscape, theta: Tensor, raw: eigenpairs.Eigenpairs
) -> tuple[dict[str, Metric], dict[str, Curve], dict[str, np.ndarray]]:
    """The largest eigenvalues of H itself."""
    curvatures = landscape.influences(landscape.curvatures(theta, raw.vectors[:, 0]))
    return (
        {"lambda_max_raw": Metric(raw.values[0].item(), "loss", standard_error(curvatures))},
        {"raw_eigenvalue": _curve(raw.values, "loss")},
        {"raw_vectors": raw.vectors.cpu().numpy()},
    )


def _sharpness(
    landscape: Landscape,
    theta: Tensor,
    P: Preconditioner,
    felt: eigenpairs.Eigenpairs,
    limit: float | None,
    unit: str,
    notes: list[str],
) -> dict[str, Metric]:
    """λ_max of P⁻¹(H + λI), and its share of the stability threshold."""
    z = P.inverse_root(felt.vectors[:, 0].double())  # zᵀHz + λ|z|² is the eigenvalue
    curvatures = landscape.influences(landscape.curvatures(theta, z)).double()
    value, error = felt.values[0].item(), standard_error(curvatures)
    notes += _single(curvatures, P.diagonal[felt.vectors[:, 0].abs().argmax()].item())
    metrics = {"sharpness": Metric(value, unit, error)}
    if limit:
        shares = {source: e / limit for source, e in error.items()}
        metrics["threshold_ratio"] = Metric(value / limit, "", shares)
    return metrics


def _felt(
    hessian: eigenpairs.Matvec, P: Preconditioner, penalty: float | Tensor
) -> eigenpairs.Matvec:
    """v ↦ P^(−½)(H + λI)P^(−½)v."""

    def product(v: Tensor) -> Tensor:
        w = P.inverse_root(v.double())
        return P.inverse_root(hessian(w) + penalty * w).to(v.dtype)

    return product


def _single(curvatures: Tensor, diagonal: float) -> list[str]:
    """A note where one sample carries most of the sharpness."""
    share = (curvatures.max() / curvatures.sum()).item()
    if share < SHARE:
        return []
    return [
        f"one of {len(curvatures)} samples carries {share:.0%} of the sharpness; the parameter "
        f"where its eigenvector is largest has P={diagonal:.2g}"
    ]


def _curve(values: Tensor, unit: str) -> Curve:
    return Curve(np.arange(1.0, len(values) + 1), values.cpu().numpy(), "index", y_unit=unit)


def _update(
    landscape: Landscape, theta: Tensor, optimizer: OptimizerState, notes: list[str]
) -> dict[str, Metric]:
    """Curvature along the optimizer's next step."""
    try:
        u = optimizer.update(theta, landscape.gradient(theta)).double()
    except InputError as error:
        notes.append(f"no update_curvature: {error}")
        return {}
    if not u.any():
        notes.append("the next step is zero, so there is no curvature along it")
        return {}
    curvatures = landscape.influences(landscape.curvatures(theta, u / u.norm())).double()
    return {
        "update_curvature": Metric(curvatures.mean().item(), "loss", standard_error(curvatures))
    }


def _batch_sharpness(
    landscape: Landscape, theta: Tensor, size: int | None, rng: torch.Generator, notes: list[str]
) -> dict[str, Metric]:
    """Mean of g_BᵀH_B g_B/|g_B|² over the whole mini-batches of one pass."""
    if not landscape.has_samples:
        notes.append("batch sharpness is left out: the objective gives no losses of samples")
        return {}
    try:
        landscape.on_batch_statistics()
    except InputError as error:
        notes.append(f"batch sharpness is left out: {error}")
        return {}
    n = landscape.n_samples
    if size is None:
        notes.append("no batch_sharpness: give batch_size=…, the samples per training step")
        return {}
    if n < size:
        notes.append(f"batch sharpness is that of one batch of {n} samples, not of {size}")
        size = n
    values = []
    for index in torch.randperm(n, generator=rng)[: n - n % size].split(size):
        batch = landscape.subset(index.to(landscape.device)).on_batch_statistics()
        g = batch.gradient(theta).double()
        values.append((g @ batch.hessian(theta)(g)) / (g @ g))
    of_batch = torch.stack(values)
    return {"batch_sharpness": Metric(of_batch.mean().item(), "loss", standard_error(of_batch))}
