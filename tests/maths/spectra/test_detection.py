"""The eigenvalue that a random direction shows with 95 %, by simulation."""

from __future__ import annotations

import pytest
import torch

from lsa.maths.spectra.detection import detectable

D = 1000


@pytest.mark.parametrize("products", [1, 2, 3, 5])
def test_an_eigenvalue_of_that_size_shows_in_95_percent(products: int) -> None:
    """The largest Ritz value of m products from a random start, for others within [0, 1]."""
    value = detectable(1.0, 0.0, 1.0, dimension=D, products=products)
    rng = torch.Generator().manual_seed(products)
    spectrum = torch.rand(D, generator=rng, dtype=torch.float64)
    spectrum[0] = value
    shown = 0
    for _ in range(200):
        rows = [torch.randn(D, generator=rng, dtype=torch.float64)]
        for _ in range(products - 1):
            rows.append(spectrum * rows[-1])
        Q = torch.linalg.qr(torch.stack(rows, 1)).Q
        shown += float(torch.linalg.eigvalsh(Q.T @ (spectrum[:, None] * Q))[-1]) > 1
    assert shown >= 190 - 3 * (200 * 0.95 * 0.05) ** 0.5


def test_more_products_show_smaller_eigenvalues_and_scale_and_shift_follow() -> None:
    values = [detectable(4.0, -3.0, 1.0, dimension=D, products=m) for m in (2, 3, 4, 8)]
    assert values == sorted(values, reverse=True) and values[-1] >= 4
    moved = detectable(18.0, -3.0, 9.0, dimension=D, products=3)  # 2x + 10 of 4, −6.5, −0.5
    assert moved == pytest.approx(10 + 2 * detectable(4.0, -6.5, -0.5, dimension=D, products=3))


@pytest.mark.parametrize(("level", "low", "high", "dimension"), [(1, 1, 1, 9), (2, 0, 1, 1)])
def test_where_nothing_can_hide_it_is_the_level(level, low, high, dimension) -> None:
    assert detectable(level, low, high, dimension=dimension, products=2) == level
