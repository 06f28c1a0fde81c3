"""The loss L(θ) of one model on fixed data, and everything that follows from it."""

from lsa.landscape.landscape import Landscape, flatten

__all__ = ["Landscape", "flatten"]
