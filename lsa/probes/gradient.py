"""The gradient: its length, its angle to the optimizer's step, and where in the network it sits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.optim import Optimizer

from lsa.landscape import Landscape
from lsa.landscape.blocks import blocks, membership
from lsa.probe import Curve, Metric, Result, Same, Sizes, Work, probe, standard_error
from lsa.runtime.errors import InputError
from lsa.training import stability
from lsa.training.stability import OptimizerState


def _work(at: Sizes, **_: Any) -> Work:
    """The gradient, and that of each sample."""
    return Work(gradients=3.0 * at.samples, vectors=24)  # in float64; with the optimizer's state


@probe(
    headline=("gradient_norm", "update_angle"),
    work=_work,
    compare=("gradient_norm", "update_angle"),
    check=(Same("|∇L|", "gradient_norm", "lanczos/gradient_norm", within=1e-3),),
    during=("gradient_norm", "update_angle"),
    caption="Share of |∇L|² of each layer, from the first to the last: see which layers plain "
    "gradient descent would move. The optimizer's own steps may be elsewhere, and a large layer "
    "has a large share for its size alone.",
)
def gradient(
    landscape: Landscape,
    theta: Tensor,
    optimizer: OptimizerState | Optimizer | None = None,
) -> Result:
    """Length of ∇L, its angle to the optimizer's next step, and the share of each layer.

    update_angle is the angle between −∇L and the step u that the optimizer makes next from its
    state and the gradient over the measured samples, decoupled decay included: 0° for SGD without
    momentum, 90° where the step leaves the loss as it is to first order. It is twice the arctangent
    of |e − v|/|e + v| for the unit vectors e and v, which small angles need (Kahan 2006, "How
    futile are mindless assessments of roundoff in floating-point computation?"). An angle that is
    within the rounding of u is 0 or 180°, without an error. The optimizer is a live one of torch
    over the landscape's model, or a checkpoint's; where there is none, or it makes no step from a
    gradient (SAM), the angle is left out.

    A layer is a module with parameters of its own; the shares |(∇L)_b|²/|∇L|² add up to 1.

    Standard errors over the data are first-order, from the per-sample gradients; of the angle, with
    u held still. The length on N samples is biased up: E|∇L_N|² = |∇L|² + tr C/N, with C the
    covariance of the per-sample gradients.
    """
    g = landscape.gradient(theta).double()
    norm = g.norm().item()
    n_samples = Metric(landscape.n_samples)
    if norm == 0:
        note = "the gradient is 0, so there are no angle and no shares"
        return Result({"gradient_norm": Metric(0.0, "loss"), "n_samples": n_samples}, notes=(note,))
    u, notes = _step(landscape, theta, g, optimizer)
    angle, normal = (None, None) if u is None else _angle(-g, u, _rounding(theta, u))

    layers = blocks(landscape.unflatten(theta), 0)
    of = membership(landscape, theta, layers)
    parts, across = _slopes(landscape, theta, g, of, normal)
    total = parts.sum(1)
    metrics = {"gradient_norm": Metric(norm, "loss", standard_error(total / norm))}
    if angle is not None:
        error = standard_error(across * (180 / math.pi / norm)) if normal is not None else {}
        metrics["update_angle"] = Metric(math.degrees(angle), "°", error)
    metrics["n_samples"] = n_samples

    share = g.new_zeros(len(layers)).index_add_(0, of, g.square()) / norm**2
    # A sample moves |g_b|² by 2 g_b·(gᵢ − g)_b, and the ratio by that less its own share of |g|²'s.
    influences = 2 * (parts - share * total[:, None]) / norm**2
    curve = Curve(
        np.arange(1.0, len(layers) + 1),
        share.cpu().numpy(),
        "layer",
        _errors(influences),
    )
    arrays = {
        "layers.names": np.array(list(layers)),
        "layers.sizes": of.bincount(minlength=len(layers)).cpu().numpy(),
    }
    notes.append("layers from 1 on: " + ", ".join(layers))
    return Result(metrics, {"share_of_layer": curve}, arrays, notes=tuple(notes))


def _step(
    landscape: Landscape,
    theta: Tensor,
    g: Tensor,
    optimizer: OptimizerState | Optimizer | None,
) -> tuple[Tensor | None, list[str]]:
    """The optimizer's next step `(d,)`, or None and a note why there is none."""
    if optimizer is None:
        return None, ["no update_angle: no optimizer was given, or the checkpoint has none"]
    if not isinstance(optimizer, OptimizerState):
        optimizer = stability.read(optimizer, landscape.own_parameters)
    try:
        u = optimizer.update(theta, g.to(theta.dtype)).double()
    except InputError as error:
        return None, [f"no update_angle: {error}"]
    return (u, []) if u.any() else (None, ["no update_angle: the next step is zero"])


def _rounding(theta: Tensor, u: Tensor) -> float:
    """Relative error of a step: u is a difference of parameters in float64, then of θ's type."""
    of_difference = torch.finfo(torch.float64).eps * (theta.double().norm() / u.norm()).item()
    return max(torch.finfo(theta.dtype).eps, of_difference)


def _angle(a: Tensor, b: Tensor, rounding: float) -> tuple[float, Tensor | None]:
    """Angle of two vectors in radians, and the unit vector towards which b turns away from a.

    That is perpendicular to a; None where the angle is 0 or π to rounding.
    """
    e, v = normalize(a, dim=0), normalize(b, dim=0)
    angle = 2 * math.atan2((e - v).norm().item(), (e + v).norm().item())
    if math.sin(angle) <= 4 * rounding:
        return (0.0 if angle < 1 else math.pi), None
    return angle, normalize(v - (e @ v) * e, dim=0)


def _slopes(
    landscape: Landscape, theta: Tensor, g: Tensor, of: Tensor, normal: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Influences of each sample on g_b·g_b of the layers `(N, layers)`, and on g·normal `(N,)`."""
    n, parts, across = int(of.max()) + 1, [], []
    for rows in landscape.sample_gradients(theta):
        rows = rows.double()
        parts.append(rows.new_zeros(len(rows), n).index_add_(1, of, rows * g))
        across.append(rows @ normal if normal is not None else rows.new_zeros(len(rows)))
    return landscape.influences(torch.cat(parts)), landscape.influences(torch.cat(across))


def _errors(influences: Tensor) -> np.ndarray | None:
    n = len(influences)
    return (influences.std(0) / n**0.5).cpu().numpy() if n > 1 else None
