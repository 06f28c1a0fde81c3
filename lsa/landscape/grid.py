"""The loss on a grid of points in a plane through θ."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, MutableMapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lsa.landscape.landscape import Landscape
from lsa.maths.planes import Plane
from lsa.runtime.progress import Report

COLUMNS = ("loss", "loss_error", "rise_error", "error", "error_error")  # of a point of the grid


class Point(NamedTuple):
    """Means over the samples with their standard errors, as `COLUMNS` has them."""

    loss: float
    loss_error: float
    rise_error: float  # of loss − loss at the origin, paired by sample
    error: float  # fraction misclassified; nan where the task is no classification
    error_error: float


def grid(
    plane: Plane,
    xs: Tensor,
    ys: Tensor,
    at: Callable[[Tensor], Landscape],
    base: Tensor,
    memory: MutableMapping[str, list[float]],
    report: Report,
) -> np.ndarray:
    """`COLUMNS` at every point of a grid, `(n, m, 5)`: rows are y, columns x.

    Points that the memory holds of the same grid are not computed again. A fingerprint of the plane
    and the grid tells whether it is the same, since eigenvectors may differ in the last digit from
    one process to the next.

    Args:
        plane: Of the points θ(x, y).
        xs: `(m,)`.
        ys: `(n,)`.
        at: Gives the landscape at a θ, where batch norm is recalibrated for each.
        base: Per-sample losses at the origin `(N,)`, which rises are paired with.
        memory: What an interrupted call has computed; points are added to it.
        report: Called after every point.
    """
    fingerprint = hashlib.sha256()
    for part in (plane.origin, plane.directions, xs, ys):
        fingerprint.update(part.cpu().numpy().tobytes())
    name = fingerprint.hexdigest()[:16]
    total = len(xs) * len(ys)
    values = np.empty((len(ys), len(xs), len(COLUMNS)))
    for j, y in enumerate(ys.tolist()):
        for i, x in enumerate(xs.tolist()):
            key = f"{name} {j} {i}"
            if key not in memory:
                theta = plane.at(x, y)
                memory[key] = list(point(at(theta), theta, base))
            values[j, i] = memory[key]
            report(j * len(xs) + i + 1, total, "points of the plane")
    return values


def point(landscape: Landscape, theta: Tensor, base: Tensor) -> Point:
    """Loss and share of mistakes at θ, with standard errors over the samples.

    Args:
        landscape: What is measured.
        theta: θ `(d,)`.
        base: Per-sample losses `(N,)` in float64; the error of the rise is that of the differences
            from them.
    """
    losses, wrong = landscape.per_sample(theta)
    losses, n = landscape.influences(losses).double(), len(losses)
    mistakes = torch.full_like(losses, math.nan) if wrong is None else wrong.double()

    def error(values: Tensor) -> float:
        return (values.std() / n**0.5).item() if n > 1 else math.nan

    return Point(
        loss=losses.mean().item(),
        loss_error=error(losses),
        rise_error=error(losses - base),
        error=mistakes.mean().item(),
        error_error=error(mistakes),
    )
