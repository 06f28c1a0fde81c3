"""Second moments of two operators together: tr AB and how well A and B are aligned."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lsa.maths.spectra.krylov import Matvec, apply, gram_error, orthogonalise, to_host
from lsa.maths.spectra.trace import Estimate, rademacher
from lsa.runtime.errors import InputError
from lsa.runtime.progress import Report


@dataclass(frozen=True)
class ProductMoments:
    """Second moments of two symmetric operators A and B."""

    trace_a: Estimate  # tr A
    trace_ab: Estimate  # tr AB
    norm_a: Estimate  # ‖A‖_F
    norm_b: Estimate  # ‖B‖_F
    alignment: Estimate  # tr AB / (‖A‖_F ‖B‖_F), the cosine between A and B, in [−1, 1]
    mean_b: Estimate  # tr AB / tr A, the mean of B weighted by A


def product_moments(
    a: Matvec,
    b: Matvec,
    subspace: Tensor,
    *,
    rng: torch.Generator,
    probes: int = 10,
    report: Report | None = None,
) -> ProductMoments:
    """tr AB, the Frobenius norms and the alignment of A and B, from products with shared vectors.

    The parts on a subspace Q, which should hold the top eigenvectors of both, are exact. For the
    rest, vectors v of random signs with Q projected out are multiplied: (Av)·(Bv), |Av|² and |Bv|²
    have the wanted means (Hutchinson's estimator of tr AB, tr A² and tr B²). There are no cross
    terms, since tr AP⊥B = tr P⊥BAP⊥. A vector costs one product with each operator. Standard errors
    are the jackknife's over the probes.

    Args:
        a: v `(d,)` ↦ A v `(d,)`.
        b: v `(d,)` ↦ B v `(d,)`.
        subspace: Orthonormal columns Q `(d, k)`, with the dtype and device of the vectors.
        rng: Source of the probes.
        probes: Number of random vectors, at least 2 to have an error.
        report: Called as `report(done, total, text)`.

    Raises:
        InputError: No probes, columns that are not orthonormal, or a product that is not finite.
    """
    if probes < 1:
        raise InputError(f"probes={probes} is not positive; choose at least 1")
    if subspace.shape[1] and not gram_error(subspace.T) < 1e-3:
        raise InputError("subspace is not orthonormal; take the Q of a QR decomposition")
    d, k = subspace.shape
    exact, rest = torch.zeros(4, dtype=torch.float64), []
    for i in range(k + probes):
        if i < k:
            v = subspace[:, i]
        else:
            v = rademacher(d, rng, subspace.dtype, subspace.device)
            v, _ = orthogonalise(v, subspace.T)
        av, bv = apply(a, v).double(), apply(b, v).double()
        products = to_host(torch.stack([v.double() @ av, av @ bv, av @ av, bv @ bv]))
        if i < k:
            exact += products
        else:
            rest.append(products)
        if report:
            report(i + 1, k + probes, "moments of both operators")
    sums = torch.stack(rest)  # (probes, 4)
    left_out = (sums.sum(0) - sums) / max(1, probes - 1)  # means with each probe left out once

    def estimate(f: Callable[[Tensor], Tensor]) -> Estimate:
        value = float(f(exact + sums.mean(0)))
        if probes == 1:
            return Estimate(value, math.nan, 1)
        spread = f(exact + left_out).std() * (probes - 1) / math.sqrt(probes)
        return Estimate(value, float(spread), probes)

    return ProductMoments(
        trace_a=estimate(lambda m: m[..., 0]),
        trace_ab=estimate(lambda m: m[..., 1]),
        norm_a=estimate(lambda m: m[..., 2].sqrt()),
        norm_b=estimate(lambda m: m[..., 3].sqrt()),
        alignment=estimate(lambda m: m[..., 1] / (m[..., 2] * m[..., 3]).sqrt()),
        mean_b=estimate(lambda m: m[..., 1] / m[..., 0]),
    )
