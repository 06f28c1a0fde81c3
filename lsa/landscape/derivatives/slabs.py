"""Memory for tensors that are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SLAB = 1 << 26  # bytes
ALIGNMENT = 512  # bytes


class Slabs:
    """Memory for tensors that stay, apart from that for those which come and go.

    Among what a pass frees they would leave holes, which took as much memory again and more (seen
    with glibc, which gives pieces of a `SLAB` to nobody else).
    """

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous tensor with any numbers."""
        nbytes = math.prod(shape) * dtype.itemsize
        taken = -(-nbytes // ALIGNMENT) * ALIGNMENT
        if taken > len(self._free):
            self._free = torch.empty(max(taken, SLAB), dtype=torch.uint8, device=device)
        piece, self._free = self._free[:nbytes], self._free[taken:]
        return piece.view(dtype).view(shape)

    def copy(self, t: Tensor) -> Tensor:
        """A tensor like t."""
        strides = torch.empty_like(t, device="meta").stride()
        return self.empty((t.numel(),), t.dtype, t.device).as_strided(t.shape, strides).copy_(t)
