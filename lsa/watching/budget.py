"""How often a watch may measure: a share of the training's time is all that it takes."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

TRIAL = 2.0  # steps of the training that a trial may take
FALL = 0.1  # of the way down to a cheaper measurement that the price then goes; up it goes at once
FIRST = 2.0  # how much more a first measurement takes than later ones: memory, first calls


class Budget:
    """Time that the parts of a watch have taken, against the time of the training.

    What a measurement takes is known from the ones before, the longest above all. The first waits
    for what a trial, a small piece of its work, lets expect.

    Args:
        share: Of the training's own time, at most; None: no limit.
    """

    def __init__(self, share: float | None) -> None:
        self.share = share
        self._spent = 0.0  # seconds, of all blocks that have ended
        self._costs: dict[str, float] = {}  # of one measurement of each part, as of the last ones
        self._expected: dict[str, float] = {}  # of the first measurement
        self._begun: dict[str, float] = {}  # of the measurement that each part is at
        self._began: float | None = None
        self._steps = 0
        self._block: float | None = None  # when the block at hand began
        self._inside = False  # a part's block

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count a block's time as the watch's, whatever it is for."""
        if self._block is not None:  # counted by the block around
            yield
            return
        self._block = time.perf_counter()
        if self._began is None:
            self._began = self._block
        try:
            yield
        finally:
            self._spent, self._block = self.spent, None

    def add(self, seconds: float) -> None:
        """Count time of the watch that was measured elsewhere."""
        self._spent += seconds

    @property
    def spent(self) -> float:
        """Seconds of the watch."""
        block = 0.0 if self._block is None else time.perf_counter() - self._block
        return self._spent + block

    def costs(self, part: str, seconds: float) -> None:
        """Take what a part costs from where it was measured."""
        self._costs[part] = seconds

    @contextlib.contextmanager
    def timed(self, part: str, *, ends: bool = True) -> Iterator[None]:
        """Count a block's time as that of a part.

        Args:
            part: Name of the part.
            ends: Whether a measurement ends with the block; its blocks tell what the next costs.
        """
        if self._inside:  # counted by the block around
            yield
            return
        began, self._inside = time.perf_counter(), True
        try:
            with self.counted():
                yield
        finally:
            took, self._inside = time.perf_counter() - began, False
            self._begun[part] = self._begun.get(part, 0.0) + took
            if ends:
                took = self._begun.pop(part)
                before = self._costs.get(part, took)
                self._costs[part] = max(took, before + FALL * (took - before))

    def has_made(self, steps: int) -> None:
        """Take how many steps the training has made."""
        self._steps = steps

    @property
    def training(self) -> float:
        """Seconds that the training has taken, without the watch."""
        return 0.0 if self._began is None else time.perf_counter() - self._began - self.spent

    @property
    def overhead(self) -> float:
        """Time of the watch over that of the training; 0 before there is any."""
        return self.spent / self.training if self.training > 0 else 0.0

    def interval(self, part: str, least: int, share: float) -> int:
        """Steps from one measurement of a part to the next, for it to take a part of the budget.

        Args:
            part: Name of the part.
            least: What was asked for.
            share: Of the budget.
        """
        if self.share is None or not self._steps or not self.training > 0:
            return least
        allowed = share * self.share * self.training / self._steps  # seconds a step
        cost = self._costs.get(part, 0.0)
        if cost <= allowed * least:
            return least
        return max(least, math.ceil(cost / allowed)) if allowed > 0 else 2 * least

    def allows(self, part: str) -> bool:
        """Whether a measurement of a part stays within the budget; a trial, if none is known."""
        if self.share is None:
            return True
        cost = self._costs.get(part, self._expected.get(part))
        if cost is None:
            cost = TRIAL * self.training / self._steps if self._steps else math.inf
        return self.spent + cost <= self.share * self.training

    def unknown(self, part: str) -> bool:
        """Whether a trial must tell what a part takes."""
        return self.share is not None and part not in (*self._costs, *self._expected)

    def expect(self, part: str, pieces: float) -> None:
        """Take what the trial of a part took as one of the pieces that its measurement has."""
        self._expected[part] = FIRST * pieces * self._costs[f"trial of {part}"]
