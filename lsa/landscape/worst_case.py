"""The highest rise of the loss in a ball around θ, by projected ascents."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lsa.landscape import sam
from lsa.landscape.landscape import Landscape
from lsa.maths.ascent import Function, Peak, ascend, length
from lsa.runtime.progress import Report

SAME = 0.01  # relative difference of two peaks that count as one


class Ball(NamedTuple):
    """Perturbations T e with |e| ≤ radius in the worst case, e ~ N(0, σ²I) in the average case."""

    prefix: str  # of the names of its numbers
    scale: Tensor  # (d,) diagonal of T
    radius: float
    sigma: float


class Ascents(NamedTuple):
    """Options of the search for the highest rise in a ball."""

    starts: int
    tol: float
    max_gradients: int
    report: Report

    def climb(self, rise: Function, start: Tensor, radius: float) -> Peak:
        """One projected ascent to a local maximum of the rise on the ball |e| ≤ radius.

        Args:
            rise: e `(d,)` ↦ the rise and its gradient.
            start: First point `(d,)`.
            radius: Of the ball.
        """
        return ascend(
            rise,
            start,
            radius,
            tol=self.tol,
            max_evaluations=self.max_gradients,
            report=self.report,
        )


def rise_in(landscape: Landscape, theta: Tensor, ball: Ball) -> Function:
    """The function e ↦ L(θ + T e) − L(θ), with its gradient by e `(d,)`.

    Args:
        landscape: What is measured.
        theta: θ `(d,)`.
        ball: Its T.
    """
    base = landscape.loss(theta)

    def rise(e: Tensor) -> tuple[float, Tensor]:
        value, gradient = landscape.loss_and_gradient(theta + ball.scale * e)
        return value - base, ball.scale * gradient

    return rise


def search(
    rise: Function, theta: Tensor, ball: Ball, rng: torch.Generator, ascents: Ascents
) -> tuple[Tensor | None, list[Peak]]:
    """Ascents from SAM's step and from random points on the rim of the ball.

    Args:
        rise: Of `rise_in`.
        theta: θ `(d,)`.
        ball: Where e may lie.
        rng: Of the random starts.
        ascents: How many, and how far each goes.

    Returns:
        SAM's e `(d,)`, None where the gradient is 0; and the point that each ascent reached.
    """
    slope = rise(torch.zeros_like(theta))[1]
    step = sam.ascent(slope, ball.radius)
    first = [] if step is None else [step]
    random = ascents.starts - len(first)
    drawn = [torch.randn(len(theta), generator=rng).to(theta) for _ in range(random)]
    rim = [e * (ball.radius / length(e)) for e in drawn]
    return step, [ascents.climb(rise, e, ball.radius) for e in (*first, *rim)]


def height(peak: Peak) -> float:
    """The rise at a peak, for `max`."""
    return peak.value


def agreeing(peaks: list[Peak]) -> list[bool]:
    """Indices of the peaks as high as the highest, within the tolerance."""
    highest = max(map(height, peaks))
    return [highest - peak.value <= SAME * abs(highest) for peak in peaks]
