"""Lengths and angles of the gradient, the update and the weights of one optimizer step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lsa.runtime.errors import InputError
from lsa.watching.weights import Weights

NAMES = ("gradient_norm", "update_norm", "weight_norm", "update_ratio")  # also of each block


class Norms:
    """The weights before a step, and what the step then made of them.

    It holds two copies of the weights: those before this step, and the update of the last one.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._free: list[list[Tensor]] = []
        self._start: tuple[int, list[Tensor]] | None = None  # step, θ before it
        self._last: tuple[int, list[Tensor]] | None = None  # step, θ before it − θ after it
        self._last_square: Tensor | None = None  # its products with itself, if they are known

    @property
    def start(self) -> list[Tensor]:
        """θ before the step.

        Raises:
            InputError: It was not kept, since no step has begun.
        """
        if self._start is None:
            raise InputError(
                "the last optimizer steps before the first; give lsa.watch the optimizers in the "
                "order in which they step"
            )
        return self._start[1]

    def before(self, step: int) -> None:
        """Keep the weights before a step."""
        now = self._weights.local()
        if self._start is not None:  # of a step that has not ended
            self._free.append(self._start[1])
        buffer = self._free.pop() if self._free else [p.new_empty(p.shape) for p in now]
        torch._foreach_copy_(buffer, now)  # pyright: ignore
        self._start = step, buffer

    def ends(self, step: int) -> None:
        """Keep the update of a step that is not measured, for the angle to the next.

        Taken here and not when the next begins: a training may change weights between steps.
        """
        if self._start is not None and self._start[0] == step:
            back = self._start[1]
            torch._foreach_sub_(back, self._weights.local())  # pyright: ignore
            self._start = None
            self._remember(step, back)

    def after(self, step: int, gradients: list[Tensor | None], *, each: bool = True) -> Tensor:
        """Products of a step, `(6, parameters)`: g·g, u·u, θ·θ, −g·u, u·v and v·v.

        v is the update before this one; its rows are nan where that step was not kept.

        Args:
            step: Its number, as given to `before`.
            gradients: Those that the optimizer was given.
            each: Whether products of each parameter are wanted, see `Weights.inner`.
        """
        back = self.start  # −u from here on
        last = self._last[1] if self._last and self._last[0] == step - 1 else None
        products = self._weights.of_step(back, gradients, last, each=each)
        width = products.shape[1]
        square = self._last_square if last is not None else products.new_full((width,), math.nan)
        if square is not None and width == 1:
            square = square.sum()[None]
        if last is not None and (square is None or len(square) != width):
            square = self._weights.inner([(last, last)], each=each)[0]
        assert square is not None
        self._start = None
        self._remember(step, back, products[1])
        return torch.cat([products, square[None]])

    def _remember(self, step: int, back: list[Tensor], square: Tensor | None = None) -> None:
        if self._last is not None:
            self._free.append(self._last[1])
        self._last, self._last_square = (step, back), square


def numbers(products: list[float]) -> Mapping[str, float]:
    """Norms, their ratio and angles (in degrees), from the six products that `after` gives."""
    gradient, update, weight, descent, turn, last = products
    known: dict[str, float] = dict(
        zip(NAMES[:3], map(_root, (gradient, update, weight)), strict=True)
    )
    if weight > 0:
        known["update_ratio"] = _root(update / weight)
    if gradient * update > 0:
        known["update_angle"] = _degrees(descent / math.sqrt(gradient * update))
    if update * last > 0:
        known["turn_angle"] = _degrees(turn / math.sqrt(update * last))
    return known


def _root(square: float) -> float:
    return math.sqrt(square) if square >= 0 else math.nan


def _degrees(cosine: float) -> float:
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
