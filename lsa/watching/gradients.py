"""The gradients that the optimizers are given, unscaled, and their length before clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lsa.watching.hooks import Backward, scaler_above
from lsa.watching.own_noise import SAMPLES, OwnNoise
from lsa.watching.weights import Weights

SCALED = 1024.0  # a gradient that shrinks so much was scaled rather than clipped


class Gradients:
    """Gradients of one step.

    Clipping happens between the last backward pass and the step, where no hook is. So the length at
    the end of the backward pass is measured as well, in steps after one in which something has
    written into the gradients in between: a GradScaler unscales there, and clipping clips.

    Args:
        weights: Whose gradients.
        scaler: The `GradScaler` in use; None: one is seen when it has an optimizer step.
        noise: Of the gradients that a step adds up.
    """

    def __init__(self, weights: Weights, scaler: Any, noise: OwnNoise) -> None:
        self._weights, self._scaler, self.noise = weights, scaler, noise
        self._index = {id(p): i for i, p in enumerate(weights.parameters)}
        self._given: list[Tensor | None] = [None] * len(weights.parameters)
        self._marks: list[tuple[int, int]] = []  # of some gradients at the end of backward
        self._changed = True  # since then, in the last step
        self._square: Tensor | None = None  # |g|² at the end of backward, by parameter or whole
        self._sampling: Callable[[], bool] = lambda: False
        self._scale = 1.0  # of that g
        self._backward: Backward | None = None

    def attach(
        self,
        due: Callable[[], bool],
        run: Callable[[str, Callable[[], None]], Any],
        sampling: Callable[[], bool] | None,
    ) -> list[Any]:
        """Hooks, those on backward passes once it listens.

        Args:
            due: Whether the step at hand is measured.
            run: Does the work of a part at the end of a pass.
            sampling: Whether its single samples are; None: never.
        """
        self._sampling = sampling or (lambda: False)
        if self._weights.sharded:  # whose gradients are put in place past these hooks
            return []

        def ended() -> None:
            if due():
                run("norms", self._passed)
            if self._sampling():
                run(SAMPLES, self.noise.take_samples)

        self._backward = Backward(self._weights.parameters, ended)
        return [self, *self.noise.attach(due, run, sampling)]

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
        self._square = self._total() if wanted else None
        self._scale = self._scaler.get_scale() if self._scaler is not None else 1.0

    def take(self, optimizer: Optimizer, *, kept: bool) -> None:
        """Take the gradients that an optimizer will use.

        Args:
            optimizer: About to step.
            kept: Whether they may change while it steps, so that copies are needed.
        """
        if self._scaler is None and (found := scaler_above()) is not None and found.is_enabled():
            self._scaler, self._scale = found, found.get_scale()
        scale = getattr(optimizer, "grad_scale", None)  # of one that unscales by itself
        scale = 1.0 if scale is None else float(scale)
        own = type(optimizer).__module__.startswith("torch.optim")
        kept = kept or not own or isinstance(optimizer, LBFGS) or scale != 1
        gradients = self._weights.gradients()
        for group in optimizer.param_groups:
            for p in group["params"]:
                i = self._index.get(id(p))
                g = None if i is None else gradients[i]
                if i is None or g is None:
                    continue
                self._given[i] = g / scale if scale != 1 else g.clone() if kept else g
        # Unscaling leaves no mark in torch's counts of writes.
        self._changed = self._scaler is not None or self._now() != self._marks
        if self._backward is not None:
            self._backward.reset()

    def given(self) -> list[Tensor | None]:
        """Those that were taken in this step, in the order of the weights."""
        return self._given

    def norm_before_clipping(self, after: float) -> float | None:
        """Length at the end of the backward pass; None where it is not known, or as it is now.

        Args:
            after: The length that the optimizers were given.
        """
        if self._square is None:
            return None
        before = math.sqrt(max(0.0, self._square.sum().item())) / self._scale
        if self._scaler is None and before > SCALED * after:
            return None
        if before == 0 < after:  # they are gone when the pass ends, as each is used when it is made
            return None
        return before

    def noise_numbers(self) -> Mapping[str, float]:
        """Noise of the gradients that the step has added up; nothing where there was one."""
        return self.noise.numbers(self._square, self._scale)

    def forget(self) -> None:
        """Let the gradients go: the next step has others."""
        self._given = [None] * len(self._given)
        self._square = None
        self.noise.forget()

    def _total(self) -> Tensor:
        gradients = self._weights.gradients()
        each = self.noise.blocks or self._sampling()
        return self._weights.inner([(gradients, gradients)], each=each)[0]

    def _now(self) -> list[tuple[int, int]]:
        """What tells whether the first and the last gradient were written into."""
        gradients = (self._weights.parameters[i].grad for i in (0, -1))
        return [(id(g), g._version) if isinstance(g, Tensor) else (0, 0) for g in gradients]
