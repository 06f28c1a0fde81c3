"""The gradient noise scale from a few mini-batch gradients at one θ: cheap enough for every epoch.

Mini-batches of b samples, drawn without replacement, with gradients g₁ … g_m. Their products with
each other know no noise, and their squares know it once, so from the Gram matrix gᵢ·gⱼ alone

    |G|² = mean of gᵢ·gⱼ over i ≠ j,    tr C = b (mean of |gᵢ|² − |G|²),

both unbiased: the estimators of McCandlish et al. 2018 (App. A.1) with every pair of batches used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lsa.landscape.derivatives.precision import full_float32
from lsa.landscape.landscape import Landscape
from lsa.maths.spectra.trace import Estimate
from lsa.runtime.errors import InputError

PARTS = 8  # mini-batches: their gradients are held at once, and the errors need several
SHARE = 32  # of a split's samples, one in so many is drawn
BLOCK = 1024  # elements whose products are added in the gradients' own precision


@dataclass(frozen=True)
class NoiseScale:
    """Noise and signal of the gradient; errors are those of the draw, by the jackknife."""

    trace: Estimate  # tr C of the per-sample gradients (loss²)
    gradient_squared: Estimate  # |G|² (loss²); below 0 where the noise hides it
    scale: Estimate  # tr C/|G|² (samples); nan unless what it divides by is above 0
    diversity: Estimate  # ∑|gᵢ|²/|∑gᵢ|² over the split (Yin et al. 2018), at least 1/N; nan as well
    samples: int  # drawn


def measure(
    landscape: Landscape,
    theta: Tensor,
    rng: torch.Generator,
    *,
    parts: int = PARTS,
    size: int | None = None,
) -> NoiseScale:
    """Noise scale and gradient diversity of a landscape at θ, from samples drawn of it.

    Args:
        landscape: The split whose gradient noise is meant.
        theta: Where `(d,)`.
        rng: Draws the samples.
        parts: Mini-batches, m.
        size: Samples of each, b. By default all together are one in 32 of the split.

    Raises:
        InputError: Fewer than 3 parts, or more samples than there are.
    """
    drawn = draw(landscape.n_samples, rng, parts=parts, size=size).to(landscape.x.device)
    return of_batches(map(landscape.subset, drawn), theta, landscape.n_samples)


def draw(n: int, rng: torch.Generator, *, parts: int = PARTS, size: int | None = None) -> Tensor:
    """Which of n samples make the mini-batches, `(parts, size)`, as `measure` draws them."""
    size = max(1, n // (SHARE * parts)) if size is None else size
    if parts < 3 or size < 1 or parts * size > n:
        raise InputError(
            f"parts={parts} of size={size} out of {n} samples: choose at least 3 parts of at least "
            "1, and no more samples than there are"
        )
    return torch.randperm(n, generator=rng)[: parts * size].view(parts, size)


def of_batches(batches: Iterable[Landscape], theta: Tensor, n: int) -> NoiseScale:
    """The same of mini-batches drawn from n samples, each as a landscape of its own."""
    sizes, found = zip(*((one.n_samples, one.gradient(theta)) for one in batches), strict=True)
    return of_gram(gram(torch.stack(found)).cpu(), sizes[0], n)


@full_float32()
def gram(gradients: Tensor) -> Tensor:
    """The products gᵢ·gⱼ `(m, m)` in float64 of gradients `(m, d)`.

    Only the sums of blocks are added in float64: of float32 they are exact to 3e-7 of |gᵢ||gⱼ|
    whatever d, in a seventh of the time that gradients taken to float64 need.
    """
    d = gradients.shape[1]
    whole = d - d % BLOCK
    blocks = gradients[:, :whole].unflatten(1, (whole // BLOCK, BLOCK)).transpose(0, 1)
    rest = gradients[:, whole:]
    return (blocks @ blocks.mT).sum(0, dtype=torch.float64) + rest @ rest.T


def of_gram(gram: Tensor, size: int, n: int) -> NoiseScale:
    """The same from the products gᵢ·gⱼ `(m, m)` of the gradients of batches of `size` of n."""
    m = len(gram)
    rows, diagonal = gram.sum(1), gram.diagonal()
    total, own = rows.sum(), diagonal.sum()
    # The whole, then with each batch left out.
    totals = torch.cat([total[None], total - 2 * rows + diagonal])
    squares = torch.cat([own[None], own - diagonal])
    count = torch.full((m + 1,), m - 1.0, dtype=torch.float64)
    count[0] = m
    signal = (totals - squares) / (count * (count - 1))
    trace = size * (squares / count - signal)

    def estimate(f: Callable[[Tensor, Tensor], Tensor]) -> Estimate:
        value, *left_out = f(trace, signal).tolist()
        spread = torch.tensor(left_out, dtype=torch.float64).var(correction=0).item()
        return Estimate(value, math.sqrt((m - 1) * spread), m)

    return NoiseScale(
        trace=estimate(lambda t, s: t),
        gradient_squared=estimate(lambda t, s: s),
        scale=estimate(lambda t, s: _ratio(t, s)),
        # Of the n samples: mean |gᵢ|² = tr C + |G|², and |mean gᵢ|² = |G|² + tr C/n.
        diversity=estimate(lambda t, s: _ratio(t + s, n * s + t)),
        samples=m * size,
    )


def _ratio(over: Tensor, under: Tensor) -> Tensor:
    """nan where the whole, the first, divides by what noise has taken below 0."""
    return torch.where(under[0] > 0, over / under, math.nan)
