"""Sketches: few numbers, linear in a long vector, that tell its length.

What is compared by length alone, two derivatives or the even part of two values, need not be held:
the sketch of a sum is the sum of the sketches.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

SIZE, ROWS = 65_537, 256  # numbers of a sketch at least, and rows that are added up at most


def sketched(w: Tensor) -> Tensor:
    """Coordinates of w `(d,)` added up with random signs, float64.

    CountSketch (Charikar, Chen & Farach-Colton 2002) with cells in turn, of an odd number, so that
    what lies a power of two apart falls into different ones. The expected squared
    length is that of w; its relative standard deviation is at most √(2/SIZE), 0.6 %. A vector of up
    to SIZE numbers is its own sketch. Signs are always the same.
    """
    size = max(SIZE, -(-len(w) // ROWS) | 1)
    if len(w) <= size:
        return w.to(torch.float64, copy=True)
    signs, starts = _signs(size, w.device)
    found = torch.zeros(size, dtype=torch.float64, device=w.device)
    for row, start in zip(w.split(size), starts, strict=False):
        found[: len(row)].addcmul_(row.double(), signs[start : start + len(row)])
    return found


@functools.lru_cache(maxsize=4)
def _signs(size: int, device: torch.device) -> tuple[Tensor, list[int]]:
    """Signs `(2 size,)`, and where those of each row begin among them."""
    rng = torch.Generator().manual_seed(0)
    signs = 2.0 * torch.randint(2, (2 * size,), generator=rng, dtype=torch.float64) - 1
    return signs.to(device), torch.randperm(size, generator=rng)[:ROWS].tolist()
