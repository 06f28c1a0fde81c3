"""Derivatives along a direction by central differences, with an error that is told.

A difference of a function with rounding σ by a step ε is off by t ε² + σ/(√2 ε), so the best step
is (σ/(2√2 t))^⅓. It depends on the direction: on a trained transformer 3e-4 along the top
eigenvector and 3e-2 along a random one.

- σ is what a change of θ in its last place makes of the value. A sum in another order, the usual
  way, says up to eleven times too little.
- t is told by two steps, which agree to ¾ t ε². That is done once and where the step must change.
  From then on the even part of the same two values tells it, for the value at θ is known: with
  r = ‖f(θ+εv) + f(θ−εv) − 2f(θ)‖ / ‖f(θ+εv) − f(θ−εv)‖ the relative error grows as r²,
  and its factor is that of the two steps.
- Kinks of f (ReLU, max pooling) do not go away with ε. Two steps then differ whatever they are, or
  r stays as it is, where the kinks lie at θ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lsa.maths.sketch import sketched
from lsa.maths.spaces import LOCAL, Space
from lsa.runtime.errors import InputError

Function = Callable[[Tensor], Tensor]
Add = Callable[[Tensor | None, Tensor, float], Tensor]
FIRST = 1e-2  # length of the first step, for a direction of length 1
MOST = 0.1  # of any step
SMOOTH = 6.0  # two steps of a smooth function differ by at most so many r²; seen: 0.3 to 5
BENT = 0.15  # r above which a step is too long to tell
WORST = 0.1  # two steps may differ by this part of the derivative; else there are kinks
ROUNDS = 8  # pairs of steps at most
WASTE = 3.0  # times the least error, at which a step is taken anew
ENOUGH = 1e-4  # an error of this part of the largest derivative seen is none to mend
NUDGED = 1 << 20  # numbers that are nudged at once
TWO_STEPS = math.sqrt(2.5)  # rounding of the difference of two steps ε and ε/2, in σ/ε
RICHARDSON = math.sqrt(65 / 18)  # the same of (4 fine − coarse)/3


class Derivative(NamedTuple):
    """A derivative along a direction and its error."""

    value: Tensor
    error: float  # ‖value − truth‖, about


class _Pair(NamedTuple):
    """A difference of two values, its length, and that of their even part in the same units."""

    value: Tensor
    sketch: Tensor  # of the value
    size: float
    even: float


@dataclass
class _Step:
    """The step along directions of length 1, and the factor of its error."""

    size: float  # ε
    factor: float  # relative error / r²


class Differences:
    """Derivatives of a tensor-valued function at θ by central differences.

    Args:
        function: Of θ. Its values are new tensors, which are overwritten.
        theta: θ `(d,)`, or this process's part of it.
        name: What the derivative is, for messages.
        space: Of θ.
        values: Space of the function's values; default: that of θ.
        add: `(total, θ, sign)` ↦ total + sign · f(θ) in the place of the total, or sign · f(θ)
            where that is None; for a function that can add to what is there. Beside such a total
            nothing as long as a value is held while another is computed.
    """

    def __init__(
        self,
        function: Function,
        theta: Tensor,
        *,
        name: str,
        space: Space = LOCAL,
        values: Space | None = None,
        add: Add | None = None,
    ) -> None:
        self._function, self._theta, self._name = function, theta.detach(), name
        self._space, self._values = space, values or space
        self._add = add or self._added
        self._step: _Step | None = None
        self._at_theta: Tensor | None = None  # the sketch of f(θ)
        self._sigma: float | None = None
        self._largest = 0.0  # length of a derivative along a unit vector, seen so far
        self.evaluations = 0
        self.noise = 0.0  # the largest error told of a derivative along a unit vector
        self.error = 0.0  # the largest told, over the largest derivative seen

    def derivative(self, v: Tensor) -> Derivative:
        """The derivative along v, from two values of the function where a step is known.

        Args:
            v: Direction `(d,)` of any length, or this process's part of it.

        Returns:
            ∂f(θ + t v)/∂t at t = 0, of the shape of f(θ), and its error in the same units.

        Raises:
            InputError: Two steps differ by more than a tenth at any size.
        """
        length = self._space.length(v).item()
        if length == 0:
            return Derivative(torch.zeros_like(self._function(self._theta)), 0.0)
        unit = v.to(self._theta), length
        derivative = self._checked(*unit) if self._step else None
        return self._noted(derivative or self._searched(*unit), length)

    def measured(self, v: Tensor) -> Derivative:
        """The derivative along v by two steps and Richardson's extrapolation, from four values.

        The error stated has two parts: rounding, and the term of fourth order in ε, which is
        estimated by the square of that of second order.

        Args:
            v: Direction `(d,)` of any length, or this process's part of it.

        Returns:
            As `derivative`.

        Raises:
            InputError: Two steps differ by more than a tenth at any size.
        """
        length = self._space.length(v).item()
        if length == 0:
            return Derivative(torch.zeros_like(self._function(self._theta)), 0.0)
        unit = v.to(self._theta), length
        if not self._step:
            self._searched(*unit)
        assert self._step
        best, size = None, min(MOST, 3 * self._step.size)
        for _ in range(ROUNDS):
            coarse, fine = self._pair(*unit, size), self._pair(*unit, size / 2)
            apart = self._long(coarse.sketch - fine.sketch)
            magnitude = self._long(torch.lerp(coarse.sketch, fine.sketch, 4 / 3))
            magnitude = max(magnitude, 1e-300)
            rounding = RICHARDSON * self.sigma / size
            told = rounding + 2 * apart**2 / magnitude
            share, spread = coarse.even / max(coarse.size, 1e-300), TWO_STEPS * self.sigma / size
            if share > BENT or apart - spread > SMOOTH * share**2 * magnitude:
                told = max(told, apart)  # kinks, of which there is no fourth order
            extrapolated = coarse.value.lerp_(fine.value, 4 / 3)
            if best is None or told < best.error:
                best = Derivative(extrapolated, told)
            bend = max(apart / (0.75 * size**2), 1e-300)
            wanted = min(MOST, (rounding * size * magnitude / (4.5 * bend**2)) ** 0.2)
            if told < WASTE * RICHARDSON * self.sigma / wanted or told > best.error:
                break
            size = wanted
        assert best
        self._refuse(best.error, magnitude)
        return self._noted(best, length)

    @property
    def sigma(self) -> float:
        """Rounding error of a value: how far it changes when θ changes in its last digit."""
        if self._sigma is None:
            moved = sketched(self._value(None, self._nudged()))
            self._sigma = max(self._long(moved - self.at_theta), 1e-300)
        return self._sigma

    @property
    def at_theta(self) -> Tensor:
        """The sketch of f(θ)."""
        if self._at_theta is None:
            self._at_theta = sketched(self._value(None, self._theta))
        return self._at_theta

    def _nudged(self) -> Tensor:
        """θ with every number changed in its last place, up or down by chance."""
        theta = self._theta.detach().clone()
        rng = torch.Generator().manual_seed(self._space.part)
        for part in theta.split(NUDGED):
            up = torch.randint(2, part.shape, generator=rng, dtype=torch.uint8).bool()
            towards = torch.where(up, math.inf, -math.inf).to(part)
            part.copy_(torch.nextafter(part, towards))
        return theta

    def _value(self, total: Tensor | None, theta: Tensor, sign: float = 1.0) -> Tensor:
        self.evaluations += 1
        return self._add(total, theta, sign)

    def _added(self, total: Tensor | None, theta: Tensor, sign: float) -> Tensor:
        value = self._function(theta)
        return value if total is None else total.add_(value, alpha=sign)

    def _long(self, sketch: Tensor) -> float:
        """The length of what has this sketch."""
        return self._values.length(sketch).item()

    def _pair(self, v: Tensor, length: float, step: float) -> _Pair:
        """The difference of f at θ ± step · v/|v|, |v| = length, and the size of its even part."""
        at_theta, sigma, alpha = self.at_theta, self.sigma, step / length  # before a total is held
        total = self._value(None, self._theta.add(v, alpha=alpha))
        high = sketched(total)
        total = self._value(total, self._theta.sub(v, alpha=alpha), -1.0)
        apart = sketched(total)
        low = high - apart
        even = self._long(high.add_(low).sub_(at_theta, alpha=2))
        rest = math.sqrt(max(0.0, even**2 - 6 * sigma**2)) / (2 * step)
        sketch = apart.div_(2 * step)
        value = total.div_(2 * step).to(v.dtype)
        return _Pair(value, sketch, self._long(sketch), rest)

    def _checked(self, v: Tensor, length: float) -> Derivative | None:
        """The derivative by the known step; None where another step would be far better."""
        assert self._step
        step, pair = self._step.size, self._pair(v, length, self._step.size)
        error = self._step.factor * pair.even**2 / max(pair.size, 1e-300)  # t ε²
        best = self._best(error / step**2)
        rounding = self.sigma / math.sqrt(2)
        error, least = error + rounding / step, 3 / 2 * rounding / best
        self._step.size = math.sqrt(step * best)  # the next direction is like this one
        scale = max(pair.size, self._largest)
        if error > ENOUGH * scale and error > WASTE * least:
            return None
        return Derivative(pair.value, error)

    def _best(self, bend: float) -> float:
        """The step with the least error where a step ε bends by `bend` ε²."""
        return min(MOST, (self.sigma / (2 * math.sqrt(2) * max(bend, 1e-300))) ** (1 / 3))

    def _searched(self, v: Tensor, length: float) -> Derivative:
        """The derivative by the best of pairs of steps ε and ε/2, which is kept as the step."""
        step, least = 2 * self._step.size if self._step else FIRST, math.inf
        value: Tensor | None = None
        apart: dict[float, float] = {}
        for _ in range(ROUNDS):
            value = None  # of the last step: one is held while another is computed
            coarse = self._pair(v, length, step)._replace(value=v)
            fine = self._pair(v, length, step / 2)
            apart[step] = self._long(coarse.sketch - fine.sketch)
            worse = self._learn(apart, step)
            rounding = TWO_STEPS * self.sigma / step
            bend = math.sqrt(max(0.0, apart[step] ** 2 - rounding**2)) / (0.75 * step**2)
            # Two steps agree at a kink that lies at θ itself, where the even part is as large.
            kink = fine.even**2 / (4 * max(fine.size, 1e-300))
            told = max(apart[step], math.sqrt(2) * self.sigma / step, kink)
            if told < least:
                least, at, size, value = told, step, fine.size, fine.value
                factor = bend * step**2 * coarse.size / max(coarse.even**2, 1e-300)
                self._step = _Step(step / 2, min(max(2 * factor, 2.0), 1e3))
            fine = fine._replace(value=v)
            wanted = self._best(bend)  # for the finer one
            if worse:
                step = 10 * at
            elif step / 4 <= wanted <= 2 * step:
                break
            else:
                step = min(max(2 * wanted, step / 30), 30 * step)
            step = min(step, MOST)
            if step in apart:
                break
        self._refuse(least, size)
        value = self._pair(v, length, at / 2).value if value is None else value
        return Derivative(value, least)

    def _learn(self, apart: dict[float, float], step: float) -> bool:
        """Whether a larger step had a smaller error, which means that rounding prevails.

        The rounding is then larger than a change of θ in its last place has shown. So it is where
        the function computes in a lower precision than that of θ. `sigma` is raised accordingly.
        """
        for size, error in apart.items():
            if any(size < s and error > 1.5 * e for s, e in apart.items()):
                self._sigma = max(self.sigma, error * size / TWO_STEPS)
        return any(step < s and apart[step] > 1.5 * e for s, e in apart.items())

    def _refuse(self, error: float, size: float) -> None:
        scale = max(size, self._largest, torch.finfo(self._theta.dtype).tiny)
        if not error < WORST * scale:
            raise InputError(
                f"{self._name} cannot be had by differences: those of two steps are "
                f"{error / scale:.0%} apart, as they are at kinks of the loss (ReLU, max pooling) "
                "and in low precision"
            )

    def _noted(self, derivative: Derivative, length: float) -> Derivative:
        """The derivative along v from that along v/|v|; what it says of the function is kept."""
        self._largest = max(self._largest, self._long(sketched(derivative.value)))
        self.noise = max(self.noise, derivative.error)
        if self._largest > 0:
            self.error = max(self.error, derivative.error / self._largest)
        value = derivative.value if length == 1 else derivative.value.mul_(length)
        return Derivative(value, derivative.error * length)
