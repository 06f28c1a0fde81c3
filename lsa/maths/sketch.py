"""Sketches: few numbers, linear in a long vector, from which its length is estimated.

Two derivatives are compared by the length of their difference. The sketch of a difference is the
difference of the sketches, so the long vectors need not be held together.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

SIZE, ROWS = 65_537, 256  # numbers of a sketch at least, and rows that are added up at most


def sketched(w: Tensor) -> Tensor:
    """A sketch of w: its coordinates, with random signs, added up in `SIZE` cells or more.

    This is CountSketch (Charikar, Chen & Farach-Colton 2002), with cells in turn in place of random
    ones. The number of cells is odd, so that coordinates a power of two apart fall into different
    cells. The expected squared length is that of w, with a relative standard deviation of at most
    √(2/SIZE) = 0.6 %. Signs are the same in every call.

    Args:
        w: `(d,)`, of any floating dtype.

    Returns:
        `(cells,)` in float64; w itself, copied, where d ≤ `SIZE`.
    """
    size = max(SIZE, -(-len(w) // ROWS) | 1)
    if len(w) <= size:
        return w.to(torch.float64, copy=True)
    signs, starts = _signs(size, w.device)
    sketch = torch.zeros(size, dtype=torch.float64, device=w.device)
    for row, start in zip(w.split(size), starts, strict=False):
        sketch[: len(row)].addcmul_(row.double(), signs[start : start + len(row)])
    return sketch


@functools.lru_cache(maxsize=4)
def _signs(size: int, device: torch.device) -> tuple[Tensor, list[int]]:
    """Signs `(2 size,)`, and where those of each row begin among them."""
    rng = torch.Generator().manual_seed(0)
    signs = 2.0 * torch.randint(2, (2 * size,), generator=rng, dtype=torch.float64) - 1
    return signs.to(device), torch.randperm(size, generator=rng)[:ROWS].tolist()
