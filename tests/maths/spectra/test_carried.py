"""The largest eigenvalue while others overtake it, on diagonal operators that change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lsa.maths.spectra.carried import Top, top

D, TOL = 4000, 0.001


def bulk(seed: int) -> Tensor:
    values = 2 * torch.rand(D, generator=torch.Generator().manual_seed(seed)) - 0.7
    values[3] = -6.0  # a negative end further out than the bulk
    values[7], values[8] = 8.0, 5.0
    return values


def followed(spectra: list[Tensor], seed: int, hint: Tensor | None = None) -> list[Top]:
    """One measurement after the other."""
    rng = torch.Generator().manual_seed(seed)
    carried, found = torch.randn(3, D, generator=rng), []
    for i, values in enumerate(spectra):
        fresh = torch.randn(D, generator=rng)
        if hint is not None:
            fresh = fresh / fresh.norm() + hint
        most = 7 if i else 30
        found.append(
            top(lambda v, A=values: A * v, carried, fresh, tol=TOL, max_products=most, first=not i)
        )
        carried = found[-1].vectors
    return found


def changed(seed: int, values: list[float]) -> list[Tensor]:
    """Spectra in which one eigenvalue goes through some values."""
    spectra = []
    for value in values:
        spectra.append(bulk(seed))
        spectra[-1][9] = value
    return spectra


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("start", [5.5, 0.5])  # known as a runner-up, and deep in the bulk
def test_an_eigenvalue_that_grows_past_the_top_is_found_as_it_passes(seed: int, start: float):
    spectra = changed(seed, [start + 0.5 * i for i in range(30)])
    found = followed(spectra, seed)
    for values, one in zip(spectra, found, strict=True):
        exact = float(values.max())
        assert one.value <= exact + 1e-5
        # Second order in the residual where it has converged, and within it where it has not.
        assert exact - one.value <= max(1e-3 * exact, 1.01 * one.residual)
    later = [one.products for one in found[1:]]
    assert max(later) <= 7
    assert sum(later) / len(later) < 5


@pytest.mark.parametrize("seed", range(5))
def test_a_top_that_comes_from_nowhere_is_found_at_once_if_the_update_has_a_part_of_it(seed: int):
    spectra = changed(seed, [0.5] * 5 + [12.0] * 3)
    update = torch.randn(D, generator=torch.Generator().manual_seed(100 + seed))
    update /= update.norm()
    update[9] += 0.5
    found = followed(spectra, seed, update / update.norm())
    for values, one in zip(spectra, found, strict=True):
        assert float(values.max()) - one.value <= one.residual
    first, last = found[5], found[-1]
    assert first.residual > TOL * first.value or first.value > 11.9
    assert last.value == pytest.approx(12, rel=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_a_top_that_comes_from_nowhere_is_found_by_chance_within_some_measurements(seed: int):
    spectra = changed(seed, [0.5] * 3 + [12.0] * 15)
    found = followed(spectra, seed)
    assert found[2].value == pytest.approx(8, rel=2e-3)
    assert found[-1].value == pytest.approx(12, rel=1e-3)


def test_residuals_of_a_search_that_is_cut_short_say_so():
    """A top pair that lies closer together than the tolerance tells."""
    values = bulk(0)
    values[20:60] = torch.linspace(7.0, 7.99, 40)
    found = followed([values] * 3, 0)
    for one in found:
        assert 8 - one.value <= one.residual


def test_an_operator_of_rank_one_and_of_no_rank():
    u = torch.randn(50, generator=torch.Generator().manual_seed(0))
    u /= u.norm()
    start = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    options = {"tol": TOL, "max_products": 30}
    one = top(lambda v: 3 * u * (u @ v), start, torch.ones(50), **options)
    assert one.value == pytest.approx(3, rel=1e-5)
    none = top(torch.zeros_like, start, torch.ones(50), **options)
    assert (none.value, none.residual, none.products) == (0, 0, 3)
