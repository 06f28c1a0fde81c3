"""Curves between two minima that are trained for a low mean loss (Garipov et al. 2018).

φ(t) = ∑ⱼ wⱼ(t) pⱼ over points p `(n, d)`, the first and last of which are the minima: Bernstein
weights give a Bezier curve, hat functions a polygonal chain. One gradient per step, against P for
a band, makes a curve the cheap start of a search; its maximum is no saddle until relaxed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lsa.maths.paths.neb import EnergyFunction, Report
from lsa.maths.paths.polyline import with_exact_ends
from lsa.runtime.errors import InputError

Kind = Literal["bezier", "polychain"]


def bezier(a: Tensor, control: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Quadratic Bezier curve (1−t)² a + 2t(1−t) control + t² b.

    Args:
        a: Start `(d,)`.
        control: Control point `(d,)`.
        b: End `(d,)`.
        t: Parameters `(T,)` in [0, 1]; 0 and 1 give a and b bitwise.

    Returns:
        Points `(T, d)`.
    """
    return _at("bezier", torch.stack([a, control, b]), t)


def polychain(points: Tensor, t: Tensor) -> Tensor:
    """Polygonal chain through `points` `(n, d)` at t `(T,)`, each segment taking t = 1/(n−1).

    Returns:
        Points `(T, d)`; t = 0 and 1 give the ends bitwise.
    """
    return _at("polychain", points, t)


@dataclass(frozen=True)
class TrainedCurve:
    """A curve after training."""

    kind: Kind
    points: Tensor  # (n, d): a, the trained points, b
    losses: Tensor  # (steps,) loss at the t drawn in each step
    grad_evals: int  # points at which the gradient was computed
    stop_reason: str  # one plain sentence

    def at(self, t: Tensor) -> Tensor:
        """Points φ(t) `(T, d)` of the curve at t `(T,)` in [0, 1]."""
        return _at(self.kind, self.points, t)


def train_curve(
    energy: EnergyFunction,
    a: Tensor,
    b: Tensor,
    *,
    steps: int,
    lr: float,
    rng: torch.Generator,
    kind: Kind = "bezier",
    bends: int = 1,
    momentum: float = 0.9,
    samples: int = 1,
    report: Report | None = None,
) -> TrainedCurve:
    """Minimise E_{t~U(0,1)} L(φ(t)) over the inner points of a curve from a to b.

    Stochastic gradient descent from the straight line. The rate is lr for the first half of the
    steps, then falls linearly to lr/100 at 90 % (the code published with Garipov et al. 2018).

    Args:
        energy: Energies and gradients of points `(samples, d)` on mini-batch number `step`.
        a: One minimum `(d,)`, kept bitwise.
        b: The other.
        steps: Steps to make.
        lr: Largest step size; Garipov et al. 2018 took 0.015 (VGG) and 0.03 (ResNets).
        rng: Draws t; on the CPU.
        kind: "bezier" (of degree bends + 1; above 2 it can also lower the mean by dwelling at
            its ends) or "polychain".
        bends: Trained points. 1 as Garipov et al. 2018.
        momentum: Heavy ball. 0.9 as Garipov et al. 2018.
        samples: Values of t per step, one in each of as many equal parts of [0, 1], which lowers
            the variance of the gradient. 1 as Garipov et al. 2018.
        report: Called as `report(done, total, text)` after every step.

    Returns:
        The curve. A non-finite energy ends training at the last finite points.

    Raises:
        InputError: Endpoints of different shape, or an option out of range.
    """
    _check(a, b, steps, lr, bends, samples, kind)
    points = torch.stack([a, b]).detach()
    points = _at("polychain", points, torch.linspace(0, 1, bends + 2, dtype=torch.float64))
    velocity, losses = torch.zeros_like(points[1:-1]), []
    reason = f"budget of {steps} steps spent"
    for step in range(steps):
        t = (
            torch.arange(samples) + torch.rand(samples, generator=rng, dtype=torch.float64)
        ) / samples
        energies, gradients = (x.detach() for x in energy(_at(kind, points, t), step))
        losses.append(energies.double().mean())
        if not (energies.isfinite().all() and gradients.isfinite().all()):
            reason = f"energy is {losses[-1]:g} after {step} steps; lower lr={lr:g}"
            break
        w = _weights(kind, t, bends + 2)[:, 1:-1].to(points)
        velocity = momentum * velocity + w.T @ gradients / samples
        inner = points[1:-1] - lr * _rate(step / steps) * velocity
        points = torch.cat([points[:1], inner, points[-1:]])
        if report:
            report(step + 1, steps, f"loss {losses[-1]:.4g}")
    history = torch.stack(losses).cpu() if losses else torch.zeros(0, dtype=torch.float64)
    return TrainedCurve(kind, points, history, samples * len(losses), reason)


def _at(kind: Kind, points: Tensor, t: Tensor) -> Tensor:
    t = t.to(points.device, torch.float64)
    return with_exact_ends(_weights(kind, t, len(points)).to(points) @ points, t, points)


def _weights(kind: Kind, t: Tensor, n: int) -> Tensor:
    """wⱼ(t) `(T, n)`; rows sum to one."""
    j = torch.arange(n, device=t.device)
    t = t[:, None]
    if kind == "polychain":
        return (1 - (t * (n - 1) - j).abs()).clamp(min=0)
    binomial = torch.tensor([math.comb(n - 1, k) for k in range(n)], device=t.device)
    return binomial * t**j * (1 - t) ** (n - 1 - j)


def _rate(progress: float) -> float:
    """Share of the largest rate at a share of the steps: flat, linear from 0.5 to 0.9, flat."""
    return 1.0 - 0.99 * min(max((progress - 0.5) / 0.4, 0.0), 1.0)


def _check(
    a: Tensor, b: Tensor, steps: int, lr: float, bends: int, samples: int, kind: str
) -> None:
    if a.shape != b.shape or a.ndim != 1:
        raise InputError(f"a {tuple(a.shape)} and b {tuple(b.shape)} must be vectors of one length")
    if steps < 0 or not lr > 0 or bends < 1 or samples < 1:
        raise InputError(
            f"steps={steps}, lr={lr:g}, bends={bends}, samples={samples}; "
            "need steps ≥ 0, lr > 0 and the others ≥ 1"
        )
    if kind not in ("bezier", "polychain"):
        raise InputError(f"kind={kind!r} is unknown; choose 'bezier' or 'polychain'")
