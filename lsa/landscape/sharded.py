"""Samples that are shared out to the ranks that `torchrun` started.

Every rank holds θ and all samples. The ranks share the work on them, and the graphs that it keeps,
which are far larger. On each rank the landscape computes that rank's samples.

Sums are added over the ranks: each chunk is weighted by its part of all N. Per-sample values are
added as vectors that are zero at the other ranks' samples, so that their order is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from lsa.landscape.derivatives import budget
from lsa.landscape.derivatives.parts import Part
from lsa.landscape.network import Network
from lsa.landscape.problem import Problem
from lsa.landscape.samples import Samples
from lsa.runtime import ranks

P = TypeVar("P", bound=Problem)


def shared(landscape: P) -> P:
    """The landscape with its samples shared out to all ranks; itself in a process of its own.

    Raises:
        InputError: There are ranks, and the data are batches.
    """
    if not ranks.meeting():
        return landscape
    data = landscape.samples
    memory = landscape.memory
    if memory is None and landscape.device.type == "cpu":  # which the ranks of a machine share
        memory = budget.free_memory() // (2 * ranks.on_machine())
    return landscape.changed(data=Shares(data.x, data.y, data.loss, data.chunk), memory=memory)


@dataclass
class Shares(Samples):
    """Samples of which each rank computes its share, and every rank gets the result for all.

    Fewer samples than ranks, and those on batch statistics, which cannot be divided, are computed
    in full by every rank.
    """

    divisible: bool = True

    def _divided(self, n: int | None = None) -> bool:
        return self.divisible and (self.n if n is None else n) >= ranks.size()

    def _own(self, start: int, n: int) -> slice:
        """This rank's of the n samples from `start` on."""
        own = ranks.share(n) if self._divided(n) else slice(0, n)
        return slice(start + own.start, start + own.stop)

    def parts(
        self, network: Network, rows: slice | None = None, size: int | None = None
    ) -> list[Part]:
        """The chunks of this rank's samples, or of some rows, as functions of θ."""
        return super().parts(network, rows or self._own(0, self.n), size)

    def blocks(self, network: Network, size: int) -> Iterator[tuple[Part, int]]:
        """This rank's part of each block, and the number of samples that all ranks take."""
        chunk = int(ranks.agreed(str(self.chunk)))  # of which each may have chosen its own
        size = min(ranks.size() * chunk, size)
        for start in range(0, self.n, size):
            n = min(size, self.n - start)
            (part,) = self.parts(network, self._own(start, n), size)
            yield part, n

    def total(self, value: Tensor, n: int | None = None) -> Tensor:
        """The sum over n samples, of any shape, from this rank's sum; n is all by default."""
        return ranks.total(value.contiguous()) if self._divided(n) else value

    def gathered(self, values: Tensor, n: int | None = None) -> Tensor:
        """Values `(n, …)` of samples from those of this rank; default all samples."""
        n = self.n if n is None else n
        if not self._divided(n):
            return values
        numbers = values.to(torch.uint8) if values.dtype == torch.bool else values
        every = numbers.new_zeros(n, *numbers.shape[1:])
        every[ranks.share(n)] = numbers
        return ranks.total(every).to(values.dtype)

    def in_one_pass(self) -> Samples:
        """The same samples, all at once on every rank."""
        return replace(self, chunk=self.n, divisible=False)
