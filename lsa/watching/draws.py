"""Whether the passes of a step are draws of one loss, by the lengths of their gradients."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

log = logging.getLogger("lsa.watch")
LEAST = 16  # steps before it is judged
UNLIKE = 6.0  # standard errors; draws that are alike exceed them in 1 of 40,000 looks at 16 steps


class Draws:
    """Compares the passes by their place in the step.

    Of equal draws the first gradient is as long as the second on average. Where one place has the
    longer gradient step after step, the losses differ, as those of a GAN on real and on generated
    samples: then differences of the gradients are no noise.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._sums: list[float] = []  # by place, of log |a|² less its mean over the places
        self._squares: list[float] = []
        self._unlike = False

    def alike(self, squares: Sequence[float]) -> bool:
        """Whether they are, so far; says so once where they are not.

        Args:
            squares: |a|² of each pass of a step.
        """
        if self._unlike or len(squares) < 2 or not all(s > 0 for s in squares):
            return not self._unlike
        if len(squares) != len(self._sums):
            self._steps = 0
            self._sums, self._squares = [0.0] * len(squares), [0.0] * len(squares)
        logs = [math.log(s) for s in squares]
        mean = sum(logs) / len(logs)
        self._steps += 1
        for i, value in enumerate(logs):
            self._sums[i] += value - mean
            self._squares[i] += (value - mean) ** 2
        if self._steps >= LEAST and max(map(self._distance, range(len(logs)))) > UNLIKE:
            self._unlike = True
            log.warning(
                "watch: the passes of a step are no draws of one loss: the gradient of one of them "
                "is longer, step after step. Their noise is left out, and what was logged of it is "
                "the difference of the losses; measure 'noise' on batches="
            )
        return not self._unlike

    def _distance(self, i: int) -> float:
        """Of a place's mean from zero, in standard errors."""
        n, total = self._steps, self._sums[i]
        variance = (self._squares[i] - total**2 / n) / (n - 1)
        return abs(total) / math.sqrt(n * variance) if variance > 0 else 0.0
