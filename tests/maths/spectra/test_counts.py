"""Counts of products before a search against searches of made-up spectra."""

from __future__ import annotations

import pytest
import torch

from lsa.maths.spectra import counts, eigenpairs

D = 20_000


def spectrum(gap: float, low: float) -> torch.Tensor:
    """1, then 1/k with a wider or narrower first gap; the lower end at −low, −low/2, …"""
    k = torch.arange(1, D // 2 + 1, dtype=torch.float64)
    upper, lower = 1 / k, -low / k
    upper[1:] *= 2 / (1 + gap)
    return torch.cat([upper, lower])


def searched(values: torch.Tensor, seed: int, smallest: int, tol: float) -> int:
    rng = torch.Generator().manual_seed(seed)
    start = torch.randn(D, generator=rng, dtype=values.dtype)
    found = eigenpairs.lanczos(
        lambda v: values * v, start, rng=rng, largest=1, smallest=smallest, tol=tol
    )
    assert found.converged
    return found.products


@pytest.mark.parametrize("tol", [1e-1, 1e-3])
def test_the_usual_count_is_that_of_the_usual_spectrum(tol):
    values = spectrum(1.0, 0.05)
    top = sum(searched(values, seed, 0, tol) for seed in range(5)) / 5
    assert counts.upper(1, tol, D).usual == pytest.approx(top, rel=0.25)


def test_the_lower_end_of_the_usual_spectrum_takes_no_more():
    # A bound: searches deflate both ends at once.
    values = spectrum(1.0, 0.05)
    both = sum(searched(values, seed, 1, 1e-3) for seed in range(3)) / 3
    assert both <= counts.both(1, 1, 1e-3, D).usual <= 1.5 * both


@pytest.mark.parametrize("low", [0.3, 0.05, 0.01])
@pytest.mark.parametrize("gap", [0.25, 1.0, 4.0])
def test_other_spectra_lie_between(gap, low):
    values = spectrum(gap, low)
    for smallest, count in ((0, counts.upper(1, 1e-3, D)), (1, counts.both(1, 1, 1e-3, D))):
        products = searched(values, 0, smallest, 1e-3)
        assert count.least <= products <= count.most, (smallest, products, count)


def test_counts_grow_with_what_is_asked():
    one, three = (counts.upper(k, 1e-3, D) for k in (1, 3))
    assert one.least < one.usual < one.most and one.usual < three.usual
    assert counts.upper(1, 1e-6, D).usual > one.usual > counts.upper(1, 1e-3, D, near=True).usual
    assert counts.both(3, 0, 1e-3, D) == counts.upper(3, 1e-3, D, near=True)
    assert counts.both(1, 2, 1e-3, D).usual > counts.both(1, 1, 1e-3, D).usual


def test_no_more_products_than_dimensions_and_no_failure_for_one():
    assert counts.both(1, 1, 1e-3, 1) == (1, 1, 1)
