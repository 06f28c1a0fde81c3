"""The largest value of a smooth function on a ball, by projected gradient ascent."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lsa.runtime.errors import InputError, NotFinite

Function = Callable[[Tensor], tuple[float, Tensor]]
"""x `(d,)` ↦ f(x) and ∇f(x) `(d,)`."""

NEAR = 0.1  # step, in radii, of a failure that shows the other side of a kink
PATIENCE = 10  # evaluations without growth after which f has settled
FAR = 2.0  # step, in radii, beyond which the projection leaves nothing but the gradient's direction


class Peak(NamedTuple):
    """The last point of an ascent; f(x) bounds the maximum from below."""

    x: Tensor  # (d,), |x| ≤ radius
    value: float  # f(x)
    gradient: Tensor  # (d,) ∇f(x)
    gap: float  # max over the ball of ∇f(x)·(z − x): 0 at a stationary point, inside or on the rim
    evaluations: int
    converged: bool  # to the gap asked for
    settled: bool  # f(x) had stopped growing, whatever the gap


def ascend(
    function: Function,
    start: Tensor,
    radius: float,
    *,
    tol: float = 1e-3,
    max_evaluations: int = 100,
    report: Callable[[int, int, str], None] | None = None,
) -> Peak:
    """A local maximum of f on the ball |x| ≤ radius, to gap ≤ tol · f(x).

    Steps follow the normalised gradient and are projected back, as in APGD (Croce & Hein 2020),
    from the same first step of two radii. But a step is taken only if f rises; then the next is
    twice as long, else half. Long steps are the power method, with which the ascent ends on a
    quadratic. Momentum did not help on trained networks (tuned here).

    The gap is that of Frank and Wolfe (Jaggi 2013), which is the same measure inside the ball and
    on its rim. On the rim of a convex quadratic, gap = tol · f is an angle of √tol between the
    point and the gradient. It is first-order: a saddle has none either, and near one it is small.
    A few starts guard against that.

    Where f has a kink, as the loss of a network with ReLU has, the highest point may lie on it: the
    gradient jumps there, and steps along it zigzag. After a failure close by, the direction is
    therefore the shortest vector between the gradients of both sides, as in bundle methods
    (Lemaréchal 1975), which leads along the kink. The gap stays open however close x is (seen on
    trained networks, in float64 too), so an ascent also ends, settled, when f has grown by less
    than a tenth of tol · f in ten evaluations.

    Args:
        function: x `(d,)` ↦ (f(x), ∇f(x)); f(0) should be 0, so that `tol` is a share of the rise.
        start: First point `(d,)`; projected into the ball.
        radius: Of the ball.
        tol: Gap allowed, as a share of f(x).
        max_evaluations: Give up after so many evaluations.
        report: Called as `report(evaluations, max_evaluations, text)` after every evaluation.

    Raises:
        InputError: Radius, tolerance or number out of range, or f not finite at the start.
    """
    if not 0 < radius < math.inf or not tol > 0 or max_evaluations < 1:
        raise InputError(
            f"radius={radius:g}, tol={tol:g}, max_evaluations={max_evaluations}; choose all of "
            "them positive and the radius finite"
        )
    x = project(start, radius)
    value, gradient = function(x)
    if not _finite(value, gradient):
        raise NotFinite(
            f"the function is not finite at distance {x.norm():.3g} of the centre; choose a "
            f"radius below {radius:g}"
        )
    step, evaluations, earlier, across = FAR, 1, [value], None
    while True:
        gap = radius * length(gradient) - dot(gradient, x)
        converged = gap <= tol * value
        if report:
            report(evaluations, max_evaluations, f"rise {value:.4g}, gap {gap:.2g}")
        settled = evaluations > PATIENCE and 0 <= value - earlier[-PATIENCE - 1] <= tol * value / 10
        if converged or settled or evaluations == max_evaluations:
            return Peak(x, value, gradient, gap, evaluations, converged, settled)
        uphill = gradient if across is None else nearest_to_zero(gradient, across)
        uphill = uphill / max(length(uphill), torch.finfo(x.dtype).tiny)
        candidate = project(x + step * radius * uphill, radius)
        height, slope = function(candidate)
        evaluations += 1
        if _finite(height, slope) and height > value:
            if across is not None:
                across = min(across, gradient, key=lambda g: length(nearest_to_zero(slope, g)))
            x, value, gradient, step = candidate, height, slope, 2 * step
        else:
            step = min(step, FAR) / 2
            across = slope if step < NEAR and _finite(height, slope) else None
        earlier.append(value)


def nearest_to_zero(a: Tensor, b: Tensor) -> Tensor:
    """The shortest vector `(d,)` on the segment from a `(d,)` to b `(d,)`."""
    segment = b - a
    square = dot(segment, segment)
    share = min(1.0, max(0.0, -dot(a, segment) / square)) if square else 0.0
    return a + share * segment


def project(x: Tensor, radius: float) -> Tensor:
    """The point `(d,)` of the ball |x| ≤ radius that is nearest to x `(d,)`."""
    far = length(x)
    return x * (radius / far) if far > radius else x


def length(x: Tensor) -> float:
    """|x| of a vector `(d,)`, summed in float64."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


def dot(x: Tensor, y: Tensor) -> float:
    """x·y of two vectors `(d,)`, summed in float64."""
    return float(x.double() @ y.double())


def _finite(value: float, gradient: Tensor) -> bool:
    return math.isfinite(value) and math.isfinite(length(gradient))
