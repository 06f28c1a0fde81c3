"""How tensors are passed through a network: the layout of images, and samples per pass."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lsa.landscape.derivatives import budget, products
from lsa.landscape.network import Network
from lsa.runtime.errors import InputError

FEW = 8  # samples on which the memory of a pass is measured


@dataclass
class Passes:
    """Chunk size and layout of passes; None is chosen by the network when data are first given.

    Raises:
        InputError: A chunk below 1, or an unknown layout.
    """

    chunk: int | None  # samples per pass
    layout: str | None  # of images, a key of `budget.LAYOUTS`
    _saved: dict[object, float] = field(default_factory=dict)
    """By a sample's shape: bytes that its pass saves."""

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise InputError(f"chunk={self.chunk} holds no sample; choose chunk ≥ 1")
        if self.layout is not None and self.layout not in budget.LAYOUTS:
            raise InputError(f"layout={self.layout!r}; choose {' or '.join(budget.LAYOUTS)}")

    def laid_out(self, network: Network, x: Tensor) -> Tensor:
        """Inputs `(N, …)` in the layout."""
        self.layout = self.layout or _possible_layout(network, x)
        return budget.laid_out(x, budget.image_layout(network.model, x, self.layout))

    def size(self, network: Network, x: Tensor) -> int:
        """Samples per pass for inputs `(N, …)`."""
        if self.chunk:
            return self.chunk
        if x.device.type != "cuda":
            return budget.cache_size(network.model, x)
        key = (x.shape[1:], x.dtype)
        if key not in self._saved:
            few = x[:FEW]
            size = products.saved(lambda theta: network.outputs(theta, few), network.flat())
            self._saved[key] = size / len(few)
        return budget.card_size(self._saved[key], x.device)


def _possible_layout(network: Network, x: Tensor) -> str:
    """Channels last, unless the network needs contiguous images, such as for views of them."""
    first, second = budget.LAYOUTS
    layout = budget.image_layout(network.model, x)
    if layout == budget.LAYOUTS[second]:
        return second
    if layout is not None:
        try:
            with torch.no_grad():
                network.outputs(network.flat().to(x.device), budget.laid_out(x[:2], layout))
        except RuntimeError as error:
            if "view size is not compatible" in str(error):
                return second
    return first
