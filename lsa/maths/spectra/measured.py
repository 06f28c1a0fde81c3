"""Products A v that carry an error estimate, as those from differences of gradients do.

Such an operator has two members beside the call. `noise` is the largest error so far of a product
with a vector of length 1; 0 means exact. `measured(v)` returns A v at the best accuracy to be had,
and its error.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Measured:
    """v ↦ A v by measured products, and the largest of their errors for a vector of length 1."""

    def __init__(self, matvec: Any) -> None:
        self._matvec, self.noise = matvec, 0.0

    def __call__(self, v: Tensor) -> Tensor:
        """A v `(d,)` of v `(d,)`."""
        value, error = self._matvec.measured(v)
        self.noise = max(self.noise, error)
        return value
