"""Where a search for eigenvectors on many samples starts: near those of a few of the samples."""

from __future__ import annotations

import torch
from torch import Tensor

from lsa.landscape.landscape import Landscape
from lsa.maths.spectra import eigenpairs
from lsa.runtime.progress import Report

SHARE = 16  # the part of the samples that is asked first
LEAST = 32  # samples that such a part must have to say anything
TOL = 0.1  # residual there, relative to the eigenvalue
MOST = 10  # products there per pair
MORE = 2  # eigenpairs at either end beyond those wanted: the order differs between the two


def from_few(
    landscape: Landscape,
    theta: Tensor,
    rng: torch.Generator,
    *,
    largest: int,
    smallest: int,
    report: Report | None = None,
) -> Tensor:
    """Direction `(d,)` in which a search for both ends of the Hessian's spectrum may start.

    The sum of the outermost eigenvectors on a sixteenth of the samples; the gradient, where that
    would be fewer than 32. It is where to begin and no more: how far the search goes is decided by
    residuals on all samples. Five searches for three pairs above and one below, on simple_cnn and
    resnet20, took 116 products from there and 134 from the gradient, for the price of six; more
    samples or a smaller residual cost what they save (tuned here). For the upper end alone the
    gradient is as good.

    Args:
        landscape: With all samples.
        theta: Where.
        rng: Source of the choice of samples, and of the search there.
        largest: Pairs wanted at the upper end.
        smallest: Pairs wanted at the lower end.
        report: Called as `report(products, most, text)`.
    """
    gradient = landscape.gradient(theta)
    few = landscape.n_samples // SHARE
    if few < LEAST or not smallest:
        return gradient
    chosen = torch.randperm(landscape.n_samples, generator=rng)[:few].to(landscape.x.device)
    more = min(MORE, (len(theta) - largest - smallest) // 2)
    found = eigenpairs.lanczos(
        landscape.subset(chosen).hessian(theta),
        eigenpairs.start_vector(theta, rng, gradient),
        rng=rng,
        largest=largest + more,
        smallest=smallest + more,
        tol=TOL,
        confirm=0,
        max_products=MOST * (largest + smallest + 2 * more),
        report=report,
    )
    return torch.cat([found.largest.vectors, found.smallest.vectors], dim=1).sum(1)
