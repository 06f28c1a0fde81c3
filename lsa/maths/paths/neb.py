"""The nudged elastic band and the string method: relax a path into a minimum-energy path.

A path is minimum-energy when the gradient has no component across it; its maximum is then a
saddle point. The landscape is known only through a function of the pivots `(P, d)`; the endpoints
stay where they are. `lsa.maths.paths.autoneb` places the pivots.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lsa.maths.paths.polyline import redistribute, tangents
from lsa.runtime.errors import InputError
from lsa.runtime.progress import Report

EnergyFunction = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""`energy(pivots (P, d), step) -> (energies (P,), gradients (P, d))`.

All pivots of one call share one mini-batch, so that their energies are comparable; `step` counts
the calls of a search from 0 and says which mini-batch. A deterministic energy ignores it.
"""

Stop = Literal["converged", "budget", "not finite"]


@dataclass(frozen=True)
class Band:
    """A relaxed path; energies and force are measured at exactly these pivots."""

    pivots: Tensor  # (P, d)
    energies: Tensor  # (P,) on the last mini-batch
    perp_grad_norm: float  # max over interior pivots of |∇L − (∇L·τ)τ|; |∇L| at a climbing one
    stop: Stop
    stop_reason: str  # one plain sentence
    steps: int  # moves made
    grad_evals: int  # pivots at which the energy and its gradient were computed


def nudged_elastic_band(
    energy: EnergyFunction,
    path: Tensor,
    *,
    steps: int,
    lr: float,
    momentum: float = 0.9,
    method: Literal["neb", "string"] = "neb",
    climbing: bool = False,
    tol: float = 1e-3,
    spacing: Tensor | None = None,
    first_step: int = 0,
    report: Report | None = None,
) -> Band:
    """Relax a path by F = −(g − (g·τ)τ) until g ∥ τ, g = ∇L(θᵢ).

    One step is v ← momentum·v + F, θ ← θ + lr·v at every interior pivot, and redistribution of the
    pivots to `spacing`, which is the limit of infinitely stiff springs (Draxler et al. 2018). The
    velocity keeps only its part across the path, the one that redistribution does not undo.

    Args:
        energy: Energies and gradients of all pivots on one mini-batch.
        path: Starting pivots `(P, d)`, P ≥ 3; not changed.
        steps: Most moves to make.
        lr: Step size.
        momentum: Heavy ball; 0.9 as Draxler et al. 2018.
        method: "neb" moves by the gradient across the path; "string" by the whole gradient, of
            which redistribution undoes the rest (E, Ren & Vanden-Eijnden 2007). Straight moves
            along a curved path leave a gradient across it in proportion to lr; lower lr, or finish
            with "neb".
        climbing: The highest pivot, where it is a maximum of the path, climbs along it by
            F = −g + 2(g·τ)τ to the saddle (Henkelman, Uberuaga & Jónsson 2000).
        tol: Converged when the largest gradient across the path is at most this (default tuned
            here, for losses of order one). Mini-batch noise counts: below it, never reached.
        spacing: Relative distances `(P−1,)` that redistribution keeps; equal if not given.
        first_step: Number of the first call of `energy`.
        report: Called as `report(done, total, text)` after every evaluation.

    Returns:
        The band, with the reason why it stopped. When an energy is not finite: the last band whose
        energies were.

    Raises:
        InputError: A path, budget or rate that is out of range.
    """
    _check(path, steps, lr, momentum, method)
    pivots = redistribute(path.detach().clone(), spacing)
    velocity = torch.zeros_like(pivots[1:-1])
    band = Band(pivots, torch.full((len(pivots),), math.nan), math.nan, "budget", "", 0, 0)
    for step in range(steps + 1):
        energies, gradients = _evaluate(energy, pivots, first_step + step)
        evals = len(pivots) * (step + 1)
        trouble = _not_finite(energies, gradients)
        if trouble:
            reason = f"{trouble} of {len(pivots)} after {step} steps; lower lr={lr:g}"
            return replace(band, stop="not finite", stop_reason=reason, grad_evals=evals)
        climber = _climber(energies) if climbing else None
        tau = tangents(pivots, energies)
        force, residual = _forces(tau, gradients[1:-1], method, climber)
        stop, reason = _verdict(residual, tol, step, steps)
        band = Band(pivots, energies, residual, stop, reason, step, evals)
        if report:
            text = f"max energy {energies.max():.4g}, gradient across {residual:.3g}"
            report(step, steps, text)
        if stop == "converged" or step == steps:
            break
        velocity = momentum * _across(velocity, tau, climber) + force
        pivots = torch.cat([pivots[:1], pivots[1:-1] + lr * velocity, pivots[-1:]])
        pivots = _slide(pivots, spacing, climber)
    return band


def _check(path: Tensor, steps: int, lr: float, momentum: float, method: str) -> None:
    if path.ndim != 2 or len(path) < 3:
        raise InputError(f"path of shape {tuple(path.shape)}; give pivots (P, d) with P ≥ 3")
    if steps < 0 or not lr > 0 or not 0 <= momentum < 1:
        raise InputError(
            f"steps={steps}, lr={lr:g}, momentum={momentum:g}; need steps ≥ 0, lr > 0, "
            "0 ≤ momentum < 1"
        )
    if method not in ("neb", "string"):
        raise InputError(f"method={method!r} is unknown; choose 'neb' or 'string'")


def _evaluate(energy: EnergyFunction, pivots: Tensor, step: int) -> tuple[Tensor, Tensor]:
    energies, gradients = energy(pivots, step)
    if energies.shape != pivots.shape[:1] or gradients.shape != pivots.shape:
        raise InputError(
            f"energy returned {tuple(energies.shape)} and {tuple(gradients.shape)} for pivots "
            f"{tuple(pivots.shape)}; it must return (P,) energies and (P, d) gradients"
        )
    return energies.detach().double(), gradients.detach()


def _not_finite(energies: Tensor, gradients: Tensor) -> str:
    """The first pivot with a non-finite energy or gradient, in words; "" for none."""
    bad = ~energies.isfinite()
    if bad.any():
        i = int(bad.nonzero()[0])
        return f"energy is {energies[i].item():g} at pivot {i + 1}"
    bad = ~gradients.isfinite().all(dim=1)
    return f"gradient is not finite at pivot {int(bad.nonzero()[0]) + 1}" if bad.any() else ""


def _climber(energies: Tensor) -> int | None:
    """Index of the highest interior pivot; None where it only leads up to an endpoint."""
    i = 1 + int(energies[1:-1].argmax())
    peak = bool((energies[i] >= energies[i - 1]) & (energies[i] >= energies[i + 1]))
    return i if peak else None


def _forces(tau: Tensor, g: Tensor, method: str, climber: int | None) -> tuple[Tensor, float]:
    """Forces `(P−2, d)` on the interior pivots, and the largest gradient across the path."""
    parallel = (g * tau).sum(1, keepdim=True) * tau
    across = g - parallel
    force = -g if method == "string" else -across
    norms = across.norm(dim=1)
    if climber is not None:
        c = climber - 1
        force[c] = 2 * parallel[c] - g[c]
        norms[c] = g[c].norm()  # at the saddle the whole gradient vanishes
    return force, norms.max().item()


def _across(velocity: Tensor, tau: Tensor, climber: int | None) -> Tensor:
    """Velocity without its part along the path, except at the pivot that climbs along it."""
    across = velocity - (velocity * tau).sum(1, keepdim=True) * tau
    if climber is not None:
        across[climber - 1] = velocity[climber - 1]
    return across


def _slide(pivots: Tensor, spacing: Tensor | None, climber: int | None) -> Tensor:
    """Redistribute the pivots; one that climbs stays where it is."""
    if climber is None:
        return redistribute(pivots, spacing)
    before, after = (None, None) if spacing is None else (spacing[:climber], spacing[climber:])
    left = redistribute(pivots[: climber + 1], before)
    return torch.cat([left, redistribute(pivots[climber:], after)[1:]])


def _verdict(residual: float, tol: float, step: int, steps: int) -> tuple[Stop, str]:
    if residual <= tol:
        return "converged", f"converged: gradient across {residual:.3g} ≤ {tol:g}, {step} steps"
    return "budget", f"budget of {steps} steps spent: gradient across {residual:.3g} > {tol:g}"
