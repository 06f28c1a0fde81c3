"""Products that have errors, and tell them.

Such a product has `noise`, the largest error so far of one with a vector of length 1 (0: it is
exact), and `measured`, v ↦ A v as well as it can be had, with its error.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Measured:
    """v ↦ A v by measured products, and the largest of their errors for a vector of length 1."""

    def __init__(self, matvec: Any) -> None:
        self._matvec, self.noise = matvec, 0.0

    def __call__(self, v: Tensor) -> Tensor:
        """A v."""
        value, error = self._matvec.measured(v)
        self.noise = max(self.noise, error)
        return value
