"""Bezier curves between two minima, trained for a low mean loss (Garipov et al. 2018).

φ(t) = (1−t)² a + 2t(1−t) c + t² b: a and b are the minima, and the control point c is trained. A
step takes one gradient, where a step of a band takes one per pivot. So the curve is a cheap start
for a search of a path; its own maximum is no saddle until the path is relaxed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lsa.maths.paths.neb import EnergyFunction, Report
from lsa.maths.paths.polyline import with_exact_ends
from lsa.runtime.errors import InputError


@dataclass(frozen=True)
class TrainedCurve:
    """A curve after training."""

    points: Tensor  # (3, d): a, the control point, b
    losses: Tensor  # (steps,) loss at the t drawn in each step
    grad_evals: int  # points at which the gradient was computed
    stop_reason: str  # one plain sentence

    def at(self, t: Tensor) -> Tensor:
        """Points φ(t) `(T, d)` of the curve at t `(T,)` in [0, 1]; 0 and 1 give a and b bitwise."""
        return _at(self.points, t)


def train_curve(
    energy: EnergyFunction,
    a: Tensor,
    b: Tensor,
    *,
    steps: int,
    lr: float,
    rng: torch.Generator,
    momentum: float = 0.9,
    samples: int = 1,
    report: Report | None = None,
) -> TrainedCurve:
    """Minimise E_{t~U(0,1)} L(φ(t)) over the control point of a curve from a to b.

    Stochastic gradient descent from the straight line. The rate is lr for the first half of the
    steps, then falls linearly to lr/100 at 90 % (the code published with Garipov et al. 2018).

    Args:
        energy: Energies and gradients of points `(samples, d)` on mini-batch number `step`.
        a: One minimum `(d,)`, kept bitwise.
        b: The other.
        steps: Steps to make.
        lr: Largest step size; Garipov et al. 2018 took 0.015 (VGG) and 0.03 (ResNets).
        rng: Draws t; on the CPU.
        momentum: Heavy ball. 0.9 as Garipov et al. 2018.
        samples: Values of t per step, one in each of as many equal parts of [0, 1], which lowers
            the variance of the gradient. 1 as Garipov et al. 2018.
        report: Called as `report(done, total, text)` after every step.

    Returns:
        The curve. A non-finite energy ends training at the last finite points.

    Raises:
        InputError: Endpoints of different shape, or an option out of range.
    """
    _check(a, b, steps, lr, samples)
    a, b = a.detach(), b.detach()
    points = torch.stack([a, (a + b) / 2, b])
    velocity, losses = torch.zeros_like(a), []
    reason = f"budget of {steps} steps spent"
    for step in range(steps):
        t = (
            torch.arange(samples) + torch.rand(samples, generator=rng, dtype=torch.float64)
        ) / samples
        energies, gradients = (x.detach() for x in energy(_at(points, t), step))
        losses.append(energies.double().mean())
        if not (energies.isfinite().all() and gradients.isfinite().all()):
            reason = f"energy is {losses[-1]:g} after {step} steps; lower lr={lr:g}"
            break
        velocity = momentum * velocity + _weights(t)[:, 1].to(points) @ gradients / samples
        points = torch.stack([a, points[1] - lr * _rate(step / steps) * velocity, b])
        if report:
            report(step + 1, steps, f"loss {losses[-1]:.4g}")
    history = torch.stack(losses).cpu() if losses else torch.zeros(0, dtype=torch.float64)
    return TrainedCurve(points, history, samples * len(losses), reason)


def _at(points: Tensor, t: Tensor) -> Tensor:
    t = t.to(points.device, torch.float64)
    return with_exact_ends(_weights(t).to(points) @ points, t, points)


def _weights(t: Tensor) -> Tensor:
    """Weights of the three points at t, `(T, 3)`; rows sum to one."""
    return torch.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2], dim=1)


def _rate(progress: float) -> float:
    """Share of the largest rate at a share of the steps: flat, linear from 0.5 to 0.9, flat."""
    return 1.0 - 0.99 * min(max((progress - 0.5) / 0.4, 0.0), 1.0)


def _check(a: Tensor, b: Tensor, steps: int, lr: float, samples: int) -> None:
    if a.shape != b.shape or a.ndim != 1:
        raise InputError(f"a {tuple(a.shape)} and b {tuple(b.shape)} must be vectors of one length")
    if steps < 0 or not lr > 0 or samples < 1:
        raise InputError(
            f"steps={steps}, lr={lr:g}, samples={samples}; need steps ≥ 0, lr > 0 and samples ≥ 1"
        )
