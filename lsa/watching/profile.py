"""The loss along the step that an optimizer has just made, from a few forward passes.

With φ(s) = L(θ₀ + s u) on fixed data, u the update from θ₀: φ at 0, 1 and ±¼ give slope gᵀu and
curvature uᵀHu at θ₀. The first s > 0 at which φ(s) is above φ(0) again is the critical factor
(arXiv 2601.16979, "critical sharpness": there in units of the learning rate). It changes little
from measurement to measurement, so it is looked for where the last one was.

In half precision, points between θ₀ and θ₀ + u are rounded, and so are losses: differences of them
are rounding. There slope and curvature are derivatives, which cost three to four times as much, and
no critical factor is looked for.

Kinks (ReLU, max pooling) that lie between the points bend φ, and H knows nothing of them: with 64
images and a step of AdamW, differences were −24 where uᵀHu/|u|² of a small CNN was 0.9. So there,
too, slope and curvature are derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lsa.landscape import Landscape

NEAR = 0.25  # of the update: ± so far for the curvature; at ± 1 it is off by up to 1 %
FAR = 4.0  # at most, where the update is so short that rounding would decide
ROUNDING = 0.01  # of the curvature, above which points further away are taken
AGREE = 0.05  # relative difference of two guesses of the critical factor, the second then taken
PASSES = 7  # for it at most
LONGEST = 64.0  # critical factor that is looked for
DERIVED = 15  # forward passes that take as long as slopes and curvatures by derivatives


@dataclass(frozen=True)
class Profile:
    """Figures of one step; the errors are standard errors over the samples of the probe set."""

    loss: float  # L(θ₀)
    slope: float  # gᵀu (loss); nan where it is not told from rounding, as the next two
    slope_error: float
    curvature: float  # uᵀHu (loss)
    curvature_error: float
    change: float  # L(θ₀ + u) − L(θ₀)
    factor: float  # critical factor; nan where the step goes uphill or none is found
    reach: float  # of the update: ± so far rounding allows to measure the curvature
    passes: int  # forward passes over the data

    def numbers(self, update_squared: float) -> Mapping[str, float]:
        """Name → value, those that are known.

        Args:
            update_squared: |u|².
        """
        expected = self.slope + 0.5 * self.curvature
        error = math.hypot(self.slope_error, 0.5 * self.curvature_error)
        known = {
            "probe_loss": self.loss,
            "directional_sharpness": self.curvature / update_squared,
            "gain_first_order": -self.slope,
            "gain_second_order": -expected,
            "gain": -self.change,
            "critical_factor": self.factor,
        }
        if math.isfinite(self.curvature):
            known["directional_sharpness_se_data"] = self.curvature_error / update_squared
        if math.isfinite(self.slope):
            known["gain_first_order_se_data"] = self.slope_error
        if abs(expected) > 2 * error:  # else the quotient is noise
            known["gain_ratio"] = self.change / expected
        return {name: value for name, value in known.items() if math.isfinite(value)}


def profile(
    landscape: Landscape,
    start: Tensor,
    update: Tensor,
    last: Profile | None = None,
    *,
    half: torch.dtype | None = None,
    kinks: bool = False,
) -> Profile:
    """Slope, curvature and critical factor along an update.

    Args:
        landscape: L.
        start: θ₀ `(d,)`.
        update: u `(d,)`, not zero.
        last: Of an earlier update, whose figures are likely to be near.
        half: Half precision in which the network computes; None: it computes in none.
        kinks: Whether the network has kinks.
    """
    with landscape.network.at(start):  # once, rather than for each pass
        if half is not None:
            return _by_derivatives(landscape, start, update, half)
        given: Derivatives | None = None
        if kinks:
            slopes = landscape.slopes(start, update)
            given = Derivatives(slopes, landscape.curvatures(start, update))
        losses, influences = landscape.losses, landscape.influences
        return profile_of(losses, influences, start, update, last, derivatives=given)


def _by_derivatives(
    landscape: Landscape, start: Tensor, update: Tensor, half: torch.dtype
) -> Profile:
    """The same in half precision, in which θ₀ and θ₀ + u are no rounded points."""
    at0, _, slopes = landscape.per_sample_and_slopes(start, update)
    curved, at1 = landscape.curvatures(start, update), landscape.losses(start + update)
    at0, at1, slopes, curved = (t.double() for t in (at0, at1, slopes, curved))
    # What parabolas leave of the samples' changes is rounding, or more; networks often have their
    # losses in float32, and then it is less than the precision lets expect.
    left = _error(landscape.influences, at1 - at0 - slopes - curved / 2)
    noise = _rounding(at0, torch.finfo(half).eps) / math.sqrt(3)
    return Profile(
        loss=at0.mean().item(),
        slope=slopes.mean().item(),
        slope_error=_error(landscape.influences, slopes),
        curvature=curved.mean().item(),
        curvature_error=_error(landscape.influences, curved),
        change=_told((at1 - at0).mean().item(), min(noise, 2 * left)),
        factor=math.nan,
        reach=NEAR,
        passes=2 + DERIVED,
    )


def profile_of(
    losses_at: Callable[[Tensor], Tensor],
    influences: Callable[[Tensor], Tensor] | None,
    start: Tensor,
    update: Tensor,
    last: Profile | None = None,
    *,
    half: torch.dtype | None = None,
    derivatives: Derivatives | None = None,
) -> Profile:
    """The same of losses that are a function of θ.

    Args:
        losses_at: θ ↦ losses `(N,)`, or the mean alone, `(1,)`.
        influences: Values of samples ↦ their influences; None: errors are not known.
        start: θ₀.
        update: u.
        last: Of an earlier update.
        half: Half precision in which the losses are computed; what it hides is left out.
        derivatives: Where differences of losses do not tell them; None: they do.
    """
    passes, theta = 0, torch.empty_like(start)

    def losses(s: float) -> Tensor:
        nonlocal passes
        passes += 1
        return losses_at(torch.add(start, update, alpha=s, out=theta)).double()

    at0, at1 = losses(0.0), losses(1.0)
    fine = torch.float64 if update.dtype == torch.float64 else torch.float32
    rounding = _rounding(at0, torch.finfo(half or fine).eps)
    reach = NEAR if last is None else last.reach
    if derivatives is None:
        along = _by_differences(losses, at0, at1, rounding, reach)
    else:
        slopes, curved = (t.double() for t in derivatives)
        along = _Along(slopes, curved, 0.0, 0.0, reach, (NEAR, losses(NEAR)))
    change = (at1 - at0).mean().item()
    slope = along.slope.mean().item()
    known_slope = _told(slope, along.slope_noise)

    def rise(s: float) -> float:
        """φ(s) − φ(0) over s."""
        return (losses(s) - at0).mean().item() / s

    step, up = along.point
    known = [(0.0, slope), (1.0, change), (step, (up - at0).mean().item() / step)]
    downhill = known_slope < 0 and half is None
    factor = _crossing(rise, sorted(known), _guess(last)) if downhill else math.nan
    return Profile(
        loss=at0.mean().item(),
        slope=known_slope,
        slope_error=_error(influences, along.slope),
        curvature=_told(along.curvature.mean().item(), along.noise),
        curvature_error=_error(influences, along.curvature),
        change=_told(change, rounding / math.sqrt(3)),
        factor=factor,
        reach=along.reach,
        passes=passes + (0 if derivatives is None else DERIVED),
    )


class Derivatives(NamedTuple):
    """Slopes gᵢᵀu and curvatures uᵀHᵢu at θ₀ of the samples, `(N,)`; or means alone, `(1,)`."""

    slopes: Tensor
    curvatures: Tensor


class _Along(NamedTuple):
    """Slope and curvature of the samples, what rounding adds to their means, and a point."""

    slope: Tensor
    curvature: Tensor
    slope_noise: float
    noise: float
    reach: float  # for the next measurement
    point: tuple[float, Tensor]  # s and the losses there


def _by_differences(
    losses: Callable[[float], Tensor], at0: Tensor, at1: Tensor, rounding: float, step: float
) -> _Along:
    """Slope and curvature from the losses at 0, 1 and ± a step that rounding allows."""
    while True:
        up, down = losses(step), losses(-step)
        second = (up + down - 2 * at0) / step**2
        size, noise = abs(second.mean().item()), rounding / step**2
        if noise <= ROUNDING * size or step >= FAR:
            break
        step = _far_enough(max(2 * step, _reach(rounding, size)))
    # The cubic through the four points: its slope at 0 is free of the third derivative.
    middle = (up - down) / (2 * step)
    cubic = (at1 - at0 - second / 2 - middle) / (1 - step**2)
    slope_noise = rounding / (math.sqrt(12) * step)  # a difference has two roundings of the six
    reach = _far_enough(_reach(rounding, size))
    return _Along(middle - cubic * step**2, second, slope_noise, noise, reach, (step, up))


def _reach(rounding: float, size: float) -> float:
    """The length at which rounding is half of what is allowed, of a curvature of some size."""
    return math.sqrt(rounding / max(0.5 * ROUNDING * size, 1e-300))


def _far_enough(step: float) -> float:
    """A length at which the curvature may be measured."""
    step = min(FAR, max(NEAR, step))
    return max(step, 1.25) if step > 0.8 else step  # φ(1) is known, and is a point of its own


def _guess(last: Profile | None) -> float | None:
    """Where the critical factor may be: where it was, or out of sight as it was."""
    if last is None or not last.slope < 0:
        return None
    return last.factor if math.isfinite(last.factor) else LONGEST


def _crossing(
    rise: Callable[[float], float], known: list[tuple[float, float]], guess: float | None
) -> float:
    """The first zero above 0 of a smooth function that is negative at 0.

    The next point is the root of the polynomial through the three known points around it; when two
    such roots in a row agree, the second is taken.

    Args:
        rise: The function.
        known: Its values at some points, sorted; the first is 0.
        guess: Where it may be; None: where the known points say.

    Returns:
        nan where there is none up to `LONGEST`.
    """
    passes, limit = 0, LONGEST
    if guess is None or any(value >= 0 for _, value in known):
        guess, limit = _root(known), 8 * known[-1][0]
    while passes < PASSES:
        far = known[-1][0]
        if far >= LONGEST and all(value < 0 for _, value in known):
            return math.nan
        s = min(8 * far if guess is None else guess, limit, LONGEST)
        limit = 8 * max(s, far)
        if any(math.isclose(s, point, rel_tol=1e-3) for point, _ in known):
            break
        known, passes = sorted([*known, (s, rise(s))]), passes + 1
        last, guess = guess, _root(known)
        if guess is not None and last == s and abs(guess - s) <= AGREE * guess:
            break
    return math.nan if guess is None or guess > LONGEST else guess


def _root(known: list[tuple[float, float]]) -> float | None:
    """The first root above 0 of the parabola through three points around the change of sign.

    Without a change of sign, that of the last three points beyond the last; None if they have none.
    """
    above = next((i for i, (_, value) in enumerate(known) if value >= 0), None)
    if above is not None and known[above][1] == 0:
        return known[above][0]
    first = max(0, min((len(known) if above is None else above + 1) - 2, len(known) - 3))
    (a, at_a), (b, at_b), (c, at_c) = known[first : first + 3]
    low, high = (
        (known[-1][0], math.inf) if above is None else (known[above - 1][0], known[above][0])
    )
    slope = (at_b - at_a) / (b - a)
    bend = ((at_c - at_b) / (c - b) - slope) / (c - a)
    # at_a + slope (s − a) + bend (s − a)(s − b), in powers of s − a
    linear = slope - bend * (b - a)
    roots = [a + t for t in _roots(bend, linear, at_a)]
    inside = [s for s in roots if low < s < high]
    if inside:
        return min(inside)
    if above is None:
        return None
    (a, at_a), (b, at_b) = known[above - 1], known[above]
    return a - at_a * (b - a) / (at_b - at_a)


def _roots(a: float, b: float, c: float) -> list[float]:
    """Real roots of a t² + b t + c."""
    square = b * b - 4 * a * c
    if square < 0:
        return []
    q = -0.5 * (b + math.copysign(math.sqrt(square), b))
    return [n / d for n, d in ((q, a), (c, q)) if d != 0]


def _rounding(losses: Tensor, eps: float) -> float:
    """Standard deviation of √6 roundings of the mean of some losses."""
    return math.sqrt(6) * eps * losses.square().mean().sqrt().item() / math.sqrt(len(losses))


def _told(value: float, noise: float) -> float:
    """A number; nan where it is not told from rounding."""
    return value if noise <= 0.5 * abs(value) else math.nan


def _error(influences: Callable[[Tensor], Tensor] | None, values: Tensor) -> float:
    """Standard error of the mean over the units; nan where it is not known."""
    n = len(values)
    if influences is None or n < 2:
        return math.nan
    return float(influences(values).std()) / math.sqrt(n)
