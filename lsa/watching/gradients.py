"""The gradients that the optimizers are given, unscaled, and their length before clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lsa.watching.hooks import Backward, scaler_above, steps_of
from lsa.watching.own_noise import SAMPLES, OwnNoise
from lsa.watching.weights import Weights

SCALED = 1024.0  # a gradient that shrinks so much was scaled rather than clipped
WHOLE = 3e-6  # relative, of a quotient of two lengths, as rounding leaves it
OTHERS = 10  # steps in a row without such a quotient, after which no scaling by hand is assumed


class Gradients:
    """Gradients of one step.

    Clipping happens between the last backward pass and the step, where no hook is. So the length at
    the end of the backward pass is measured as well, in steps after one in which something has
    written into the gradients in between: a GradScaler unscales there, and clipping clips. So does
    a training that scales its loss by hand: by 128, or by the number of its tokens. No clipping
    makes a gradient longer, or shorter by a whole number twice in a row.

    Args:
        weights: Whose gradients.
        scaler: The `GradScaler` in use; None: one is seen when it has an optimizer step.
        noise: Of the gradients that a step adds up.
    """

    def __init__(self, weights: Weights, scaler: Any, noise: OwnNoise) -> None:
        self._weights, self.noise = weights, noise
        self._index = {id(p): i for i, p in enumerate(weights.parameters)}
        self._given: list[Tensor | None] = [None] * len(weights.parameters)
        self._marks: list[tuple[int, int]] = []  # of some gradients at the end of backward
        self._changed = True  # since then, in the last step
        self._changes = False  # the same, of the step at hand
        self._square: Tensor | None = None  # |g|² at the end of backward, by parameter or whole
        self._taken = [False] * len(weights.parameters)
        self._by: Optimizer | None = None  # which has taken its own last
        self.closed = False  # all are taken: what comes is none of the step's, as of a closure
        self._late: Optimizer | None = None  # which may make its gradients itself
        self._apart = False  # optimizers take theirs between passes, or with scalers of their own
        self._told = scaler
        self._scalers: list[Any] = [scaler] * len(weights.parameters)
        self._scales = [1.0] * len(weights.parameters)  # of that g
        self._wholes = 0  # steps in a row in which g was divided by a whole number
        self._others = 0  # and by another one
        self._by_hand = False  # the training does that
        self._unscaled = 1.0  # by what g was divided by hand; nan: not known
        self._sampling: Callable[[], bool] = lambda: False
        self._backward: Backward | None = None

    def attach(
        self,
        due: Callable[[], bool],
        run: Callable[[str, Callable[[], None]], Any],
        sampling: Callable[[], bool] | None,
        interrupted: Callable[[Optimizer], None],
    ) -> list[Any]:
        """Hooks, those on backward passes once it listens.

        Args:
            due: Whether the step at hand is measured.
            run: Does the work of a part at the end of a pass.
            sampling: Whether its single samples are; None: never.
            interrupted: Is told when a pass begins after an optimizer has taken the last gradients
                and while it does not step: its step has raised, unless others follow.
        """
        if sampling is not None:
            self._sampling = lambda: sampling() and not self.closed
        if self._weights.sharded:  # whose gradients are put in place past these hooks
            return []

        def counts() -> bool:
            return not self.closed and due()

        def begins() -> bool:
            if self.closed and self._by is not None and not steps_of(self._by):
                interrupted(self._by)
            return counts()

        def ended() -> None:
            if counts():
                run("norms", self._passed)
            if self._sampling():
                run(SAMPLES, self.noise.take_samples)

        self._backward = Backward(self._weights.parameters, ended)
        given = None if sampling is None else self._sampling
        return [self, *self.noise.attach(counts, begins, run, given)]

    def listen(self, on: bool) -> None:
        """Put the hooks of backward passes on, or take them off: they cost every pass some time."""
        if self._backward is not None:
            self._backward.listen(on)
        self.noise.listen(on)

    def remove(self) -> None:
        """Take the hooks of backward passes off."""
        self.listen(False)

    def _passed(self) -> None:
        """A backward pass has ended."""
        self.noise.passed()
        self._marks = self._now()
        wanted = self._changed or self.noise.several() or self._sampling()
        self._apart |= any(self._taken)
        before, self._square = self._square, self._total() if wanted else None
        if self._square is not None and any(self._taken):  # what is taken is as it was
            self._square = self._merged(before, self._square)
        self._read_scales([i for i, taken in enumerate(self._taken) if not taken])
        if self._late is not None:
            self.take(self._late, kept=True)

    def _merged(self, before: Tensor | None, now: Tensor) -> Tensor | None:
        """Squares of what is taken as they were, else as they are; None where only sums are."""
        if before is None or not len(before) == len(now) == len(self._taken):
            return None
        return torch.where(torch.tensor(self._taken, device=now.device), before, now)

    def _read_scales(self, chosen: list[int]) -> None:
        """Read the scales that some of the gradients have."""
        scales = {id(None): 1.0}
        for i in chosen:
            scaler = self._scalers[i]
            if id(scaler) not in scales:
                scales[id(scaler)] = float(scaler.get_scale())
            self._scales[i] = scales[id(scaler)]

    def take(self, optimizer: Optimizer, *, kept: bool, closure: bool = False) -> None:
        """Take the gradients that an optimizer will use.

        Args:
            optimizer: About to step.
            kept: Whether they may change while it steps, so that copies are needed.
            closure: Whether a closure has made them. One that computes the loss alone leaves the
                backward pass to the optimizer, and they are taken again when that ends.
        """
        own = [self._index.get(id(p)) for group in optimizer.param_groups for p in group["params"]]
        chosen = [i for i in own if i is not None]
        self._see_scaler(chosen)
        if any(self._taken[i] for i in chosen):  # a second time in one step
            self._square = None
        scale = getattr(optimizer, "grad_scale", None)  # of one that unscales by itself
        scale = 1.0 if scale is None else float(scale)
        plain = type(optimizer).__module__.startswith("torch.optim")
        kept = kept or not plain or isinstance(optimizer, LBFGS) or scale != 1
        gradients = self._weights.gradients()
        self._late = optimizer if closure and not self.noise.passes else None
        for i in chosen:
            self._taken[i] = self._late is None
            if (g := gradients[i]) is not None:
                self._given[i] = g / scale if scale != 1 else g.clone() if kept else g
        self.closed, self._by = all(self._taken), optimizer
        # Unscaling leaves no mark in torch's counts of writes.
        scaled = any(scaler is not None for scaler in self._scalers)
        self._changes |= scaled or self._now() != self._marks
        if self._backward is not None:
            self._backward.reset()

    def _see_scaler(self, chosen: list[int]) -> None:
        """See the GradScaler that has an optimizer step, if there is one and none was told."""
        found = scaler_above() if self._told is None else None
        if found is None or not found.is_enabled():
            return
        unknown = [i for i in chosen if self._scalers[i] is not found]
        for i in unknown:
            self._scalers[i] = found
        self._read_scales(unknown)
        self._apart |= len({id(s) for s in self._scalers if s is not None}) > 1

    def given(self) -> list[Tensor | None]:
        """Those that were taken in this step, in the order of the weights."""
        return self._given

    def norm_before_clipping(self, after: float) -> float | None:
        """Length at the end of the backward pass; None where it is not known, or as it is now.

        Args:
            after: The length that the optimizers were given.
        """
        if self._square is None or (scale := self._scale()) is None:
            return None
        before = math.sqrt(max(0.0, (self._square.cpu() / scale**2).sum().item()))
        if not before > 0 < after:  # gone when the pass ends, as each is used when it is made
            return before if after == 0 else None
        ratio = before / after
        self._judge(ratio)
        if math.isnan(self._unscaled) or (ratio < 1 - WHOLE and self._unscaled == 1):
            return None
        return before / self._unscaled

    def _judge(self, ratio: float) -> None:
        """See whether the training has divided g by hand.

        Args:
            ratio: |g| at the end of the backward pass over that which the optimizers were given.
        """
        more = max(ratio, 1 / ratio)
        whole = more > 1.5 and abs(more - round(more)) <= WHOLE * min(more, 100)
        self._wholes = self._wholes + 1 if whole else 0
        known = whole or abs(more - 1) <= WHOLE
        self._others = 0 if known else self._others + 1
        self._by_hand = (self._by_hand or self._wholes > 1) and self._others < OTHERS
        scaled = any(scaler is not None for scaler in self._scalers)
        hidden = ratio > SCALED and not scaled
        if self._by_hand and known:
            self._unscaled = ratio
        else:
            self._unscaled = math.nan if self._by_hand or whole or hidden else 1.0

    def _scale(self) -> float | Tensor | None:
        """Of the gradients at the end of the backward pass, by parameter if they differ.

        None where they differ and only the sum of all squares is known.
        """
        if len({*self._scales}) == 1:
            return self._scales[0]
        if self._square is None or len(self._square) < len(self._scales):
            return None
        return torch.tensor(self._scales, dtype=torch.float64, device="cpu")

    def noise_numbers(self) -> Mapping[str, float]:
        """Noise of the gradients that the step has added up; nothing where there was one."""
        scale = self._scale()
        known = scale is not None and not math.isnan(self._unscaled)
        return self.noise.numbers(
            self._square if known else None, (1.0 if scale is None else scale) * self._unscaled
        )

    def forget(self) -> None:
        """Let the gradients go: the next step has others."""
        self._given = [None] * len(self._given)
        self._taken, self.closed, self._late = [False] * len(self._taken), False, None
        self._changed, self._changes = self._changes, False
        self._square, self._unscaled = None, 1.0
        self.noise.forget()

    def _total(self) -> Tensor:
        gradients = self._weights.gradients()
        each = self.noise.blocks or self._sampling() or self._apart
        return self._weights.inner([(gradients, gradients)], each=each)[0]

    def _now(self) -> list[tuple[int, int]]:
        """What tells whether the first and the last gradient were written into."""
        gradients = (self._weights.parameters[i].grad for i in (0, -1))
        return [(id(g), g._version) if isinstance(g, Tensor) else (0, 0) for g in gradients]
