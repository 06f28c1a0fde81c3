"""The loss along the step that an optimizer has just made, from a few forward passes.

With φ(s) = L(θ₀ + s u) on fixed data, u the update from θ₀: φ at 0, 1 and ±¼ give slope gᵀu and
curvature uᵀHu at θ₀. The first s > 0 at which φ(s) is above φ(0) again is the critical factor
(arXiv 2601.16979, "critical sharpness": there in units of the learning rate).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lsa.landscape import Landscape

NEAR = 0.25  # of the update: ± so far for the curvature; at ± 1 it is off by up to 1 %
FAR = 4.0  # at most, where the update is so short that rounding would decide
ROUNDING = 0.01  # of the curvature, above which points further away are taken
FACTOR = 0.05  # relative width to which the critical factor is found
PASSES = 7  # for it at most
LONGEST = 64.0  # critical factor that is looked for


@dataclass(frozen=True)
class Along:
    """Figures of one step; the errors are standard errors over the samples of the probe set."""

    loss: float  # L(θ₀)
    slope: float  # gᵀu (loss)
    slope_error: float
    curvature: float  # uᵀHu (loss); nan where it is not told from rounding
    curvature_error: float
    change: float  # L(θ₀ + u) − L(θ₀)
    factor: float  # critical factor; nan where the step goes uphill or none is found
    passes: int  # forward passes over the data

    def numbers(self, update_squared: float) -> Mapping[str, float]:
        """Name → value, those that are known.

        Args:
            update_squared: |u|².
        """
        expected = self.slope + 0.5 * self.curvature
        error = math.hypot(self.slope_error, 0.5 * self.curvature_error)
        found = {
            "probe_loss": self.loss,
            "directional_sharpness": self.curvature / update_squared,
            "directional_sharpness_se_data": self.curvature_error / update_squared,
            "gain_first_order": -self.slope,
            "gain_first_order_se_data": self.slope_error,
            "gain_second_order": -expected,
            "gain": -self.change,
            "critical_factor": self.factor,
        }
        if abs(expected) > 2 * error:  # else the quotient is noise
            found["gain_ratio"] = self.change / expected
        return {name: value for name, value in found.items() if math.isfinite(value)}


def along(landscape: Landscape, start: Tensor, update: Tensor) -> Along:
    """Slope, curvature and critical factor along an update.

    Args:
        landscape: L.
        start: θ₀ `(d,)`.
        update: u `(d,)`, not zero.
    """
    passes = 0

    def losses(s: float) -> Tensor:
        nonlocal passes
        passes += 1
        return landscape.losses(start + s * update).double()

    at0, at1 = losses(0.0), losses(1.0)
    step, rounding = NEAR, _rounding(at0, update.dtype)
    while True:
        up, down = losses(step), losses(-step)
        second = (up + down - 2 * at0) / step**2
        size, noise = abs(second.mean().item()), rounding / step**2
        if noise <= ROUNDING * size or step >= FAR:
            break
        step = min(FAR, step * max(2.0, math.sqrt(noise / max(ROUNDING * size, 1e-300))))
        step = max(step, 1.25) if step > 0.8 else step  # φ(1) is known, and is a point of its own
    told = noise <= 0.5 * size
    # The cubic through the four points: its slope at 0 is free of the third derivative.
    middle = (up - down) / (2 * step)
    cubic = (at1 - at0 - second / 2 - middle) / (1 - step**2)
    slope = middle - cubic * step**2
    change = (at1 - at0).mean().item()

    def rise(s: float) -> float:
        """φ(s) − φ(0) over s."""
        return (losses(s) - at0).mean().item() / s

    known = [(0.0, slope.mean().item()), (1.0, change)]
    known.append((step, (up - at0).mean().item() / step))
    factor = _crossing(rise, sorted(known)) if known[0][1] < 0 else math.nan
    return Along(
        loss=at0.mean().item(),
        slope=slope.mean().item(),
        slope_error=_error(landscape, slope),
        curvature=second.mean().item() if told else math.nan,
        curvature_error=_error(landscape, second),
        change=change,
        factor=factor,
        passes=passes,
    )


def _crossing(rise: Callable[[float], float], known: list[tuple[float, float]]) -> float:
    """The first zero above 0 of a function that is negative at 0, to a relative width.

    Args:
        rise: The function.
        known: Its values at some points, sorted; the first is 0.
    """
    passes = 0
    while True:
        above = next((i for i, (_, value) in enumerate(known) if value >= 0), None)
        if passes == PASSES and above is None:
            return math.nan
        if above is None:
            (a, at_a), (b, at_b) = known[-2:]
            bend = (at_b - at_a) / (b - a)
            guess = b - at_b / bend if bend > 0 else math.inf
            s = min(max(1.05 * guess, 1.3 * b), 4 * b)
            if b >= LONGEST:
                return math.nan
        else:
            (a, at_a), (b, at_b) = known[above - 1], known[above]
            root = a - at_a * (b - a) / (at_b - at_a)
            if b - a <= FACTOR * b or passes == PASSES:
                return root
            # A little beyond the root that a straight line has, on the side of the farther end.
            margin = 0.4 * FACTOR * b
            s = root + margin if root - a > b - root else root - margin
            s = min(max(s, a + 0.1 * (b - a)), b - 0.1 * (b - a))
        known = sorted([*known, (s, rise(s))])
        passes += 1


def _rounding(losses: Tensor, dtype: torch.dtype) -> float:
    """Standard deviation of √6 roundings of the mean of some losses."""
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return math.sqrt(6) * eps * losses.square().mean().sqrt().item() / math.sqrt(len(losses))


def _error(landscape: Landscape, values: Tensor) -> float:
    """Standard error of the mean over the units; nan of one."""
    n = len(values)
    return float(landscape.influences(values).std()) / math.sqrt(n) if n > 1 else math.nan
