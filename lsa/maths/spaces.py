"""Inner products and random vectors, summed in float64, of vectors that processes may share.

Float32 sums over ten million numbers of which few are large are off by a percent on a CPU, and with
them the Rayleigh quotient of an eigenvector. Every length and inner product of long vectors is
taken here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lsa.maths.sums import square

BLOCK = 1 << 14  # numbers that are added up in the vectors' own precision


def _alone(part: Tensor) -> Tensor:
    return part


@dataclass(frozen=True)
class Space:
    """Sums over the coordinates of vectors, which one process holds or several share.

    Args:
        total: A float64 tensor of this process's part of a sum ↦ the sum over all processes.
        part: Number of this process.
        parts: Number of processes.
    """

    total: Callable[[Tensor], Tensor] = _alone
    part: int = 0
    parts: int = 1

    def dots(self, V: Tensor, w: Tensor) -> Tensor:
        """Inner products `(j,)` in float64 of rows V `(j, d)` with w `(d,)`."""
        d, size = len(w), max(BLOCK, len(w) // 256)
        pieces = [V[:, i : i + size] @ w[i : i + size] for i in range(0, d, size)]
        return self.total(torch.stack(pieces).double().sum(0))

    def dot(self, v: Tensor, w: Tensor) -> float:
        """v·w of two vectors `(d,)`."""
        return float(self.dots(v[None], w.to(v)))

    def length(self, w: Tensor) -> Tensor:
        """|w| of a vector `(d,)`, a float64 scalar `()` on its device."""
        return self.total(square(w)).sqrt()

    def dimension(self, w: Tensor) -> int:
        """Number of coordinates, over all processes, of a vector whose part here is w `(d,)`."""
        return int(self.total(torch.tensor(float(len(w)), dtype=torch.float64)))

    def normal(self, like: Tensor, rng: torch.Generator) -> Tensor:
        """A standard normal vector `(d,)` like another, or this process's part of one.

        Generators of all processes are seeded alike; each process then draws numbers of its own.
        """
        return torch.randn(len(like), generator=self._own(rng), device=rng.device).to(like)

    def signs(self, like: Tensor, rng: torch.Generator) -> Tensor:
        """A vector `(d,)` of random signs ±1 like another; generators as for `normal`."""
        bits = torch.randint(0, 2, (len(like),), generator=self._own(rng), device=rng.device)
        return (2 * bits - 1).to(like)

    def _own(self, rng: torch.Generator) -> torch.Generator:
        if self.parts == 1:
            return rng
        seed = int(torch.randint(1 << 48, (), generator=rng, device=rng.device))
        return torch.Generator(rng.device).manual_seed(seed + self.part)


LOCAL = Space()
"""The space of vectors that this process holds alone."""
