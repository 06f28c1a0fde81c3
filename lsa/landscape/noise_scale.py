"""The gradient noise scale from a few mini-batch gradients at one θ: cheap enough for every epoch.

Let g₁ … g_m be gradients of mini-batches of b samples, drawn without replacement. Noise of two
different batches is independent, so E[gᵢ·gⱼ] = |G|² for i ≠ j, while E[|gᵢ|²] = |G|² + tr C/b. The
Gram matrix gᵢ·gⱼ therefore gives

    |G|² = mean of gᵢ·gⱼ over i ≠ j,    tr C = b (mean of |gᵢ|² − |G|²),

both unbiased. These are the estimators of McCandlish et al. 2018 (App. A.1), with all pairs used.
Their quotient has a 95 % interval that is not symmetric. It has no upper end where |G|² is not told
from zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lsa.landscape.derivatives import sample_gradients
from lsa.landscape.derivatives.precision import full_float32
from lsa.landscape.landscape import Landscape
from lsa.landscape.samples import Samples
from lsa.maths.ratios import Quotient, quotient
from lsa.maths.spectra.trace import Estimate
from lsa.runtime.errors import InputError

PARTS = 8  # mini-batches: their gradients are held at once, and the errors need several
SHARE = 32  # of a split's samples, one in so many is drawn
BLOCK = 1024  # elements whose products are added in the gradients' own precision


@dataclass(frozen=True)
class NoiseScale:
    """Noise and signal of the gradient; errors are those of the draw, by the jackknife.

    Quotients are nan where |G|² is not told from zero: then only ends of their intervals are known.
    """

    trace: Estimate  # tr C of the per-sample gradients (loss²)
    gradient_squared: Estimate  # |G|² (loss²); below 0 where the noise hides it
    scale: Quotient  # tr C/|G|² (samples)
    diversity: Quotient  # ∑|gᵢ|²/|∑gᵢ|² over the split (Yin et al. 2018), from 1/N to 1
    samples: int  # drawn

    def numbers(self) -> dict[str, float]:
        """Name → value, with standard errors or the ends of a 95 % interval; no unknown one."""
        values: dict[str, float] = {}
        for name in ("trace", "gradient_squared"):
            estimate, name = getattr(self, name), name.replace("trace", "noise_trace")
            values |= {name: estimate.value, f"{name}_se_data": estimate.error}
        for name, ratio in (("noise_scale", self.scale), ("gradient_diversity", self.diversity)):
            values |= ratio.named(name)
        return {name: value for name, value in values.items() if math.isfinite(value)}


class Spread(NamedTuple):
    """Of the covariance of some gradients: bounds of its largest eigenvalue and of its norm."""

    largest: float  # ≥ λ_max
    squares: float  # ≥ the sum of the squared eigenvalues, ‖·‖_F²

    def least(self, n: int) -> Callable[[float], float]:
        """|G|² ↦ the variance of its estimate from n gradients, were they normal.

        For a G along the top eigenvector; the second part is that of a sum over pairs.
        """
        return lambda size: 4 * self.largest * max(0.0, size) / n + 2 * self.squares / n**2


def draw(n: int, rng: torch.Generator, *, parts: int = PARTS, size: int | None = None) -> Tensor:
    """Indices `(parts, size)` of samples drawn out of n without replacement, for `of_batches`.

    Args:
        n: Samples of the split.
        rng: Source of the draw.
        parts: Mini-batches, m.
        size: Samples of each, b. By default all together are one in 32 of the split.

    Raises:
        InputError: Fewer than 3 parts, or more samples than there are.
    """
    size = max(1, n // (SHARE * parts)) if size is None else size
    if parts < 3 or size < 1 or parts * size > n:
        raise InputError(
            f"parts={parts} of size={size} out of {n} samples: choose at least 3 parts of at least "
            "1, and no more samples than there are"
        )
    return torch.randperm(n, generator=rng)[: parts * size].view(parts, size)


def of_batches(batches: Iterable[Landscape], theta: Tensor, n: int) -> NoiseScale:
    """Noise scale and gradient diversity at θ `(d,)`, from mini-batches drawn of n samples.

    Args:
        batches: Landscapes of the mini-batches, of equal size.
        theta: Parameters `(d,)`.
        n: Samples of the split that the batches were drawn from.
    """
    sizes, gradients = zip(*((b.n_samples, b.gradient(theta)) for b in batches), strict=True)
    return of_gram(gram(torch.stack(gradients)).cpu(), sizes[0], n)


@full_float32()
def sample_grams(landscape: Landscape, theta: Tensor) -> dict[tuple[int, int], Tensor] | None:
    """The products gᵢ·gⱼ `(N, N)` of all per-sample gradients, by place in θ, from one pass.

    None where they are not known layer by layer, or not cheaply (`SampleGradients.grams`).
    """
    data = landscape.data
    if not isinstance(data, Samples) or data.ratios is not None:
        return None
    with landscape.network.at(theta.detach().requires_grad_()):
        (part,) = data.in_one_pass().parts(landscape.network)
        gradients = sample_gradients.of(part.losses, theta)
    return None if gradients is None else gradients.grams()


@full_float32()
def gram(gradients: Tensor) -> Tensor:
    """The products gᵢ·gⱼ `(m, m)` in float64 of gradients `(m, d)`.

    Only the sums of blocks are added in float64: of float32 they are exact to 3e-7 of |gᵢ||gⱼ|
    whatever d, in a seventh of the time that gradients taken to float64 need.
    """
    d = gradients.shape[1]
    full = d - d % BLOCK
    blocks = gradients[:, :full].unflatten(1, (full // BLOCK, BLOCK)).transpose(0, 1)
    rest = gradients[:, full:]
    return (blocks @ blocks.mT).sum(0, dtype=torch.float64) + rest @ rest.T


def of_gram(gram: Tensor, size: int, n: int) -> NoiseScale:
    """Noise scale from the products gᵢ·gⱼ `(m, m)` of the gradients of batches.

    Args:
        gram: The products, float64.
        size: Samples of each batch.
        n: Samples of the split.
    """
    return of_sums(gram.sum(1), gram.diagonal(), size, n, spread(gram))


def spread(gram: Tensor) -> Spread:
    """Of the covariance of normal gradients, from their products `(m, m)`; never below zero."""
    m = len(gram)
    centred = gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()
    own = centred.diagonal()
    pairs = m * (m - 1)
    mean = (centred.square().sum() - own.square().sum()) / pairs
    # E[(cᵢ·cⱼ)²] of normal gradients less their mean, of covariance A (Isserlis).
    trace = own.sum() / (m - 1)
    squares = (mean - (trace / m) ** 2) / ((1 - 1 / m) ** 2 + 1 / m**2)
    bound = max(0.0, float(squares))
    return Spread(math.sqrt(bound), bound)


def of_sums(rows: Tensor, diagonal: Tensor, size: int, n: int, spread: Spread) -> NoiseScale:
    """Noise scale from the gradients of m batches: gᵢ·∑gⱼ `(m,)` and |gᵢ|² `(m,)`, in float64.

    Args:
        rows: Products with the sum.
        diagonal: Squares.
        size: Samples of each batch.
        n: Samples of the split.
        spread: Of the covariance of these gradients.
    """
    m = len(rows)
    total, own = rows.sum(), diagonal.sum()
    # Of all batches, then with each batch left out.
    totals = torch.cat([total[None], total - 2 * rows + diagonal])
    squares = torch.cat([own[None], own - diagonal])
    count = torch.full((m + 1,), m - 1.0, dtype=torch.float64, device=rows.device)
    count[0] = m
    signal = (totals - squares) / (count * (count - 1))
    trace = size * (squares / count - signal)

    def estimate(values: Tensor) -> Estimate:
        value, *left_out = values.tolist()
        spread = torch.tensor(left_out, dtype=torch.float64).var(correction=0).item()
        return Estimate(value, math.sqrt((m - 1) * spread), m)

    over, under = (m * values[0] - (m - 1) * values[1:] for values in (trace, signal))
    scale = quotient(over, under, least=spread.least(m))
    return NoiseScale(
        trace=estimate(trace),
        gradient_squared=estimate(signal),
        scale=scale,
        diversity=diversity(scale, n),
        samples=m * size,
    )


def diversity(scale: Quotient, n: int) -> Quotient:
    """∑|gᵢ|²/|∑gᵢ|² of n samples, from their noise scale.

    Mean |gᵢ|² = tr C + |G|², and |mean gᵢ|² = |G|² + tr C/n.
    """
    low, high = (1.0 if math.isinf(s) else (s + 1) / (s + n) for s in (scale.low, scale.high))
    return Quotient((scale.value + 1) / (scale.value + n), low, high)
