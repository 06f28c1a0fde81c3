"""Random affine subspaces θ₀ + P z of parameter space.

P `(D, d)` is random and its columns have unit norm over the whole network; only z `(d,)` is
trained, from zero: ∇_z L(θ₀ + P z) = Pᵀ∇L (Li, Farkhoor, Liu & Yosinski 2018, "Measuring the
Intrinsic Dimension of Objective Landscapes"). How large d must be is found in `lsa.maths.crossing`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from scipy import linalg
from torch import Tensor

from lsa.runtime.errors import InputError

KINDS = ("dense", "sparse", "fastfood")
MEMORY = 2**30  # bytes; a dense P above this is regenerated block by block (tuned here)
BLOCK = 2**26  # bytes of one block of columns of a dense P (tuned here)


@dataclass(frozen=True)
class Projection:
    """A fixed random P `(D, d)`, as its two products."""

    kind: str
    dimension: int  # D
    d: int
    expand: Callable[[Tensor], Tensor]  # z (d,) -> P z (D,)
    restrict: Callable[[Tensor], Tensor]  # g (D,) -> Pᵀ g (d,)


def make_projection(
    kind: str,
    dimension: int,
    d: int,
    rng: torch.Generator,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    memory: int = MEMORY,
) -> Projection:
    """A random P `(D, d)` with columns of unit norm: |P z| ≈ |z|.

    Args:
        kind: `dense`: Gaussian columns; time and memory O(Dd). A P above `memory` bytes is not
            stored: each product draws it anew from its seeds, bounded but many times slower.
            `sparse`: entries ± with density 1/√D (Li, Hastie & Church 2006); O(d√D) both.
            `fastfood`: H G Π H B, stacked (Le, Sarlós & Smola 2013); time O(D log d), memory O(D).
        dimension: D, the number of parameters.
        d: Dimension of the subspace, 1 ≤ d ≤ D.
        rng: Source of P. `dense` takes only seeds from it and draws on `device`, so that its P
            differs between CPU and GPU; the other kinds do not.
        dtype: Floating type of P.
        device: Where the products run.
        memory: Bytes that a stored dense P may take.

    Raises:
        InputError: Unknown kind, or d outside 1…D.
    """
    if not 1 <= d <= dimension:
        raise InputError(
            f"subspace dimension d={d} is outside 1…{dimension}, the number of parameters; "
            f"choose 1 ≤ d ≤ {dimension}"
        )
    if kind == "dense":
        return _dense(dimension, d, rng, dtype, torch.device(device), memory)
    if kind == "sparse":
        return _sparse(dimension, d, rng, dtype, torch.device(device))
    if kind == "fastfood":
        return _fastfood(dimension, d, rng, dtype, torch.device(device))
    raise InputError(f"unknown projection {kind!r}; choose one of {', '.join(KINDS)}")


def _dense(
    D: int, d: int, rng: torch.Generator, dtype: torch.dtype, device: torch.device, memory: int
) -> Projection:
    """Normalised Gaussian columns, in blocks that each have a seed."""
    bytes_per_column = D * dtype.itemsize
    widths = [len(part) for part in torch.arange(d).split(max(1, BLOCK // bytes_per_column))]
    seeds = torch.randint(2**62, (len(widths),), generator=rng, device=rng.device).tolist()

    def draw(seed: int, width: int) -> Tensor:
        source = torch.Generator(device).manual_seed(seed)
        rows = torch.randn(width, D, generator=source, dtype=dtype, device=device)
        return rows.div_(rows.norm(dim=1, keepdim=True))  # a row is a column of P

    numbers = range(len(widths))
    fits = d * bytes_per_column <= memory
    stored = [draw(seeds[j], widths[j]) for j in numbers] if fits else None

    def block(j: int) -> Tensor:
        return stored[j] if stored else draw(seeds[j], widths[j])

    def expand(z: Tensor) -> Tensor:
        parts = z.split(widths)
        total = parts[0] @ block(0)
        for j in numbers[1:]:
            total = total + parts[j] @ block(j)
        return total

    def restrict(g: Tensor) -> Tensor:
        return torch.cat([block(j) @ g for j in numbers])

    return Projection("dense", D, d, expand, restrict)


def _sparse(
    D: int, d: int, rng: torch.Generator, dtype: torch.dtype, device: torch.device
) -> Projection:
    """Each entry non-zero with probability 1/√D, equal sizes ±1/√(entries in the column)."""
    source = {"generator": rng, "device": rng.device}
    density = max(D, 2) ** -0.5
    mean = d * D * density
    # Gaps between Bernoulli successes are geometric: only the non-zeros are ever drawn.
    gaps = torch.empty(int(mean + 8 * math.sqrt(mean)) + 16, dtype=torch.int64, device=rng.device)
    cells = gaps.geometric_(density, generator=rng).cumsum(0) - 1
    cells = cells[cells < d * D]
    columns, rows = cells // D, cells % D
    empty = (torch.bincount(columns, minlength=d) == 0).nonzero().squeeze(1)
    columns = torch.cat([columns, empty])
    rows = torch.cat([rows, torch.randint(D, (len(empty),), **source)])
    signs = torch.randint(2, (len(rows),), **source) * 2 - 1
    values = signs / torch.bincount(columns, minlength=d)[columns].double().sqrt()
    columns, rows, values = columns.to(device), rows.to(device), values.to(device, dtype)

    def expand(z: Tensor) -> Tensor:
        return z.new_zeros(D).index_add(0, rows, values * z[columns])

    def restrict(g: Tensor) -> Tensor:
        return g.new_zeros(d).index_add(0, columns, values * g[rows])

    return Projection("sparse", D, d, expand, restrict)


def _fastfood(
    D: int, d: int, rng: torch.Generator, dtype: torch.dtype, device: torch.device
) -> Projection:
    """⌈D/L⌉ stacked blocks H G Π H B of size L = 2^⌈log₂ d⌉, cut to D rows and d columns.

    A whole block has columns of equal norm √L|G|, so columns are exact when L divides D. Otherwise
    r = D mod L rows of the last block hold r/L of its square norm in expectation (a Beta variable),
    and the norms scatter about 1 with standard deviation L/(2D) √(2 r/L (1−r/L)/(L+2)) < 1/(2√D).
    """
    L = 1 << (d - 1).bit_length()
    blocks = -(-D // L)
    source = {"generator": rng, "device": rng.device}
    signs = (torch.randint(2, (blocks, L), **source) * 2 - 1).to(device, dtype)  # B
    order = torch.rand(blocks, L, **source).argsort(1).to(device)  # Π
    G = torch.randn(blocks, L, dtype=torch.float64, **source)
    kept = torch.full((blocks,), L, dtype=torch.float64, device=rng.device)
    kept[-1] = D - (blocks - 1) * L
    G = (G / (kept @ G.square().sum(1)).sqrt()).to(device, dtype)

    def expand(z: Tensor) -> Tensor:
        mixed = fwht(signs * F.pad(z, (0, L - d)))
        return fwht(G * mixed.gather(1, order)).flatten()[:D]

    def restrict(g: Tensor) -> Tensor:
        mixed = G * fwht(F.pad(g, (0, blocks * L - D)).view(blocks, L))
        return (signs * fwht(torch.zeros_like(mixed).scatter(1, order, mixed))).sum(0)[:d]

    return Projection("fastfood", D, d, expand, restrict)


_RADIX = 5  # levels per matrix product; measured 5 times faster than one butterfly per level


@lru_cache
def _hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.from_numpy(linalg.hadamard(size)).to(device, dtype)


def fwht(x: Tensor) -> Tensor:
    """Walsh–Hadamard transform H x along the last axis, Hᵢⱼ = (−1)^(bits common to i and j).

    Unnormalised (H H = L) and in natural (Hadamard) order.

    Args:
        x: Shape `(…, L)`, L a power of two.

    Returns:
        Shape `(…, L)`, in O(L log L) time.

    Raises:
        InputError: L is not a power of two.
    """
    length = x.shape[-1]
    if length < 1 or length & (length - 1):
        raise InputError(f"length {length} is not a power of two; pad with zeros to the next one")
    levels = length.bit_length() - 1
    while levels:
        step = min(levels, _RADIX)
        # Transform the top index bits and move them to the bottom; after all steps they are back.
        H = _hadamard(2**step, x.dtype, x.device)
        x = (x.unflatten(-1, (2**step, -1)).transpose(-1, -2) @ H).flatten(-2)
        levels -= step
    return x
