"""Trace of an operator from products with random vectors, with an interval that can be trusted."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from scipy.special import stdtrit
from torch import Tensor

from lsa.maths.spectra.krylov import Matvec, apply, gram_error, to_host
from lsa.runtime.errors import InputError


class Estimate(NamedTuple):
    """A mean over random probe vectors, with its standard error."""

    value: float
    error: float  # standard error over the probes; nan for a single probe
    samples: int  # independent probes behind the standard error

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Confidence interval by Student's t with samples − 1 degrees of freedom."""
        half = _quantile(self.samples, level) * self.error if self.samples > 1 else math.inf
        return self.value - half, self.value + half


def mean(x: Tensor) -> Estimate:
    """Mean of independent values `(n,)`, its standard error sd/√n, and n."""
    n = len(x)
    return Estimate(float(x.mean()), float(x.std()) / math.sqrt(n) if n > 1 else math.nan, n)


def rademacher(
    dimension: int, rng: torch.Generator, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """A vector `(d,)` of independent signs ±1, whose trace estimate has the least variance."""
    bits = torch.randint(0, 2, (dimension,), generator=rng, device=rng.device)
    return (2 * bits - 1).to(dtype=dtype, device=device)


def hutchinson_trace(
    matvec: Matvec,
    dimension: int,
    *,
    rng: torch.Generator,
    tol: float | None = None,
    probes: int = 30,
    max_probes: int = 1000,
    subspace: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Estimate:
    """tr A ≈ mean of vᵀ A v over random signs v; variance 2(‖A‖_F² − ∑ᵢ Aᵢᵢ²) per probe.

    With `tol` the number of probes is chosen in two stages (Stein 1945): the spread of the first
    `probes` fixes how many are needed, and alone sets the interval. Its coverage is then the
    stated one, which a rule that stops when the running mean looks settled cannot promise.

    Args:
        matvec: v `(d,)` ↦ A v `(d,)`.
        dimension: d.
        rng: Source of the probes.
        tol: Half-width of the 95 % interval to reach, relative to the trace. Default: no second
            stage.
        probes: Number of probes, or of those of the first stage. 30 put Student's t within 5 % of
            the normal quantile.
        max_probes: Most probes of both stages; if they do not reach `tol` the interval shows it.
        subspace: Orthonormal columns Q `(d, k)`, such as the top eigenvectors: tr(QᵀAQ) is
            computed exactly, by k products, and only the rest is estimated.
        dtype: Floating type of the probes.
        device: Device of the probes.

    Raises:
        InputError: Numbers out of range, a subspace that is not orthonormal, a product of the
            wrong shape or not finite.
    """
    _check(dimension, probes, max_probes, tol, subspace)
    Q = torch.zeros(dimension, 0) if subspace is None else subspace
    Q = Q.to(dtype=dtype, device=device)
    exact = sum(_form(matvec, q) for q in Q.T)

    def sample(n: int) -> Tensor:
        v = (rademacher(dimension, rng, dtype, device) for _ in range(n))
        return torch.tensor([_form(matvec, x - Q @ (Q.T @ x)) for x in v], dtype=torch.float64)

    first = sample(probes)
    total = _stein(first, exact, tol, max_probes)
    value = torch.cat([first, sample(total - probes)]).mean() + exact
    spread = float(first.std()) if probes > 1 else math.nan
    return Estimate(float(value), spread / math.sqrt(total), probes)


def hutchpp_trace(
    matvec: Matvec,
    dimension: int,
    *,
    rng: torch.Generator,
    products: int = 90,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Estimate:
    """tr A by Hutch++: exact on the range of A S, S random, by Hutchinson on the rest.

    A third of the products goes to each of sketch, exact part and rest. The error falls as
    1/products instead of 1/√products for a positive semidefinite A (Meyer, Musco, Musco &
    Woodruff 2021, Algorithm 1).

    Args:
        matvec: v `(d,)` ↦ A v `(d,)`.
        dimension: d.
        rng: Source of the sketch and the probes.
        products: Matrix-vector products to spend, at least 6; no more than 2d are of use.
        dtype: Floating type of the vectors.
        device: Device of the vectors.

    Raises:
        InputError: Too few products, or a product of the wrong shape or not finite.
    """
    if products < 6:
        raise InputError(f"products={products} is too few for Hutch++; choose at least 6")
    k = min(products // 3, dimension)
    sketch = [apply(matvec, rademacher(dimension, rng, dtype, device)) for _ in range(k)]
    to_host(torch.stack([w.sum() for w in sketch]))  # refuse what QR would turn into nonsense
    Q, _ = torch.linalg.qr(torch.stack(sketch, 1))
    rest = max(2, products - 2 * k)
    return hutchinson_trace(
        matvec, dimension, rng=rng, probes=rest, subspace=Q, dtype=dtype, device=device
    )


def _form(matvec: Matvec, v: Tensor) -> float:
    """Quadratic form vᵀ A v."""
    return float(to_host(v.double() @ apply(matvec, v).double()))


def _stein(first: Tensor, exact: float, tol: float | None, max_probes: int) -> int:
    """Probes that bring the half-width of the 95 % interval to tol · |trace|."""
    n = len(first)
    if tol is None:
        return n
    half = _quantile(n, 0.95) * float(first.std())
    target = tol * abs(float(first.mean()) + exact)
    if half > target * math.sqrt(max_probes):
        return max_probes
    return max(n, math.ceil((half / target) ** 2)) if half > 0 else n


def _quantile(samples: int, level: float) -> float:
    return float(stdtrit(samples - 1, (1 + level) / 2))


def _check(
    dimension: int, probes: int, max_probes: int, tol: float | None, subspace: Tensor | None
) -> None:
    if dimension < 1 or probes < 1:
        raise InputError(f"dimension={dimension}, probes={probes}; both must be at least 1")
    if tol is not None and not (tol > 0 and 2 <= probes <= max_probes):
        raise InputError(
            f"tol={tol}, probes={probes}, max_probes={max_probes}; "
            "choose tol > 0 and 2 ≤ probes ≤ max_probes"
        )
    if subspace is not None and subspace.shape[0] != dimension:
        raise InputError(f"subspace has {subspace.shape[0]} rows; give ({dimension}, k)")
    if subspace is not None and not gram_error(subspace.T) < 1e-3:
        raise InputError("subspace is not orthonormal; take the Q of a QR decomposition")
