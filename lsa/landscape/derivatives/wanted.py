"""What is wanted of the gradient of a layer that is linear in its parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Wanted:
    """Whether the gradient by the parameters is used itself, and what it is differentiated by.

    Both hold once the forward pass has ended: a network may take derivatives of its own within it.
    """

    values: bool  # or only what it gives when it is differentiated
    linear: bool  # it is differentiated by its cotangents alone, in which it is linear
    ended: bool = False  # the forward pass

    @property
    def valued(self) -> bool:
        """Whether the gradient by the parameters must be computed in a backward pass now.

        Without a graph the gradient is a product's: its value is all that it is computed for.
        """
        return self.values or not self.ended or not torch.is_grad_enabled()

    @property
    def only_g(self) -> bool:
        """Whether derivatives by inputs and parameters can be left out of a backward pass now."""
        return self.linear and self.ended
