"""Lanczos where it could claim what it did not find, and at the limits of its inputs."""

from __future__ import annotations

import math

import pytest
import torch
from spectra import Counting, generator, hessian_like, normal, symmetric
from torch import Tensor

from lsa.maths.spectra.eigenpairs import lanczos
from lsa.runtime.errors import InputError

# --- false convergence --------------------------------------------------------------------------


def hidden(index: int) -> Tensor:
    start = normal(5000, seed=5)
    start[index] = 0
    return start


def single(index: int) -> Tensor:
    return (torch.arange(5000) == index).double()


@pytest.mark.parametrize(
    "start",
    [hidden(0), hidden(2), single(1), single(1) + 1e-4 * normal(5000), single(1) + single(4)],
    ids=["top hidden", "third hidden", "second exactly", "second nearly", "two others"],
)
def test_a_start_without_the_top_eigenvectors_does_not_fool_it(start: Tensor) -> None:
    spectrum = hessian_like(5000)
    result = lanczos(Counting(spectrum), start, rng=generator(1), largest=3, smallest=0)
    assert result.converged
    assert torch.allclose(result.largest.values, spectrum[:3], rtol=1e-3)


def test_confirmation_takes_so_many_products_and_changes_nothing_that_was_found() -> None:
    spectrum = hessian_like(5000)
    found = [
        lanczos(Counting(spectrum), normal(5000), rng=generator(1), largest=3, confirm=confirm)
        for confirm in (0, 3, 8)
    ]
    first = found[0]
    assert [one.products - first.products for one in found] == [0, 3, 8]
    for one in found[1:]:
        assert torch.allclose(one.largest.values, first.largest.values, rtol=1e-5)
        assert one.orthogonality < 1e-13


def test_without_confirmation_it_would() -> None:
    result = lanczos(
        Counting(hessian_like(5000)), single(1), rng=generator(1), smallest=0, confirm=0
    )
    assert float(result.largest.values[0]) == pytest.approx(60)


@pytest.mark.parametrize("seed", range(5))
def test_random_starts_agree_within_their_residuals(seed: int) -> None:
    A = hessian_like(1000)
    result = lanczos(Counting(A), normal(1000, seed=seed), rng=generator(seed), largest=5)
    errors = (result.largest.values - A[:5]).abs()
    assert (errors <= result.largest.residuals + 1e-12).all()


def test_too_few_products_say_so() -> None:
    result = lanczos(
        Counting(hessian_like(2000)), normal(2000), rng=generator(), largest=5, max_products=8
    )
    assert not result.converged and not result.confirmed
    assert result.products == 8
    assert not result.largest.converged.all()
    assert (result.largest.residuals[~result.largest.converged] > 0).all()


# --- boundary -----------------------------------------------------------------------------------


def test_asymmetric_operator_is_noticed() -> None:
    A = symmetric(200)
    skew = normal(200, 200, seed=7)
    B = A + 0.05 * (skew - skew.T) / math.sqrt(200)
    wrong = lanczos(Counting(B), normal(200), rng=generator(), max_products=60)
    right = lanczos(Counting(A), normal(200), rng=generator(), max_products=60)
    assert right.asymmetry < 1e-12
    assert wrong.asymmetry > 1e-3
    for pairs in (wrong.largest, wrong.smallest):
        residuals = (B @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
        assert torch.allclose(residuals, pairs.residuals, rtol=1e-8)
    assert not wrong.converged  # the residual contains the skew part


def test_fresh_directions_equal_to_the_start() -> None:
    """The generator that drew the start, seeded alike again: nothing is left of the new row."""
    spectrum = hessian_like(5000)
    start = torch.randn(5000, generator=generator(), dtype=torch.float64)
    result = lanczos(Counting(spectrum), start, rng=generator(), largest=3)
    assert result.converged and result.orthogonality < 1e-12
    assert torch.allclose(result.largest.values, spectrum[:3], rtol=1e-5)


@pytest.mark.parametrize("d", [3000, 200_000])
def test_float32_basis_stays_orthonormal(d: int) -> None:
    spectrum = torch.cat(
        [torch.rand(d - 4, generator=generator()), torch.tensor([20.0, 30, 50, -9])]
    )
    start = normal(d, dtype=torch.float32)
    result = lanczos(Counting(spectrum), start, rng=generator(), largest=3)
    assert result.converged
    # rounding 6e-8 per addition, a random walk over the additions of one of 8 vector lanes in
    # pieces of 2^14 numbers; 2 for a maximum over pairs of rows
    assert result.orthogonality < 2 * 6e-8 * math.sqrt(2**14 / 8)
    assert result.asymmetry < 2 * 6e-8 * math.sqrt(2**14 / 8)


def test_start_rng_and_block_are_left_alone() -> None:
    spectrum, start = hessian_like(300), normal(300, 2)
    before, state = start.clone(), torch.get_rng_state()
    lanczos(Counting(spectrum), start, rng=generator())
    assert torch.equal(start, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_same_seed_same_result() -> None:
    spectrum = hessian_like(300)
    one, two = (lanczos(Counting(spectrum), normal(300), rng=generator(4)) for _ in range(2))
    assert torch.equal(one.largest.vectors, two.largest.vectors)


def test_gradients_are_not_recorded() -> None:
    spectrum = hessian_like(100).requires_grad_()
    result = lanczos(lambda v: spectrum * v, normal(100).requires_grad_(), rng=generator())
    assert not result.largest.vectors.requires_grad


def test_report_is_called_once_per_product() -> None:
    calls = []
    result = lanczos(
        Counting(hessian_like(300)),
        normal(300),
        rng=generator(),
        report=lambda done, total, text: calls.append((done, total, text)),
    )
    assert [done for done, _, _ in calls] == list(range(1, result.products + 1))
    assert calls[0][1] == 1000 and "λ" in calls[-1][2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"largest": 11}, "11.*d=10"),
        ({"largest": 0, "smallest": 0}, "largest=0"),
        ({"largest": -1}, "largest=-1"),
        ({"tol": 0.0}, "tol=0"),
        ({"tol": math.nan}, "tol=nan"),
        ({"floor": 2.0}, "floor=2"),
        ({"confirm": -1}, "confirm=-1"),
        ({"max_products": 1}, "max_products=1"),
        ({"basis": 3}, "basis=3.*at least 6"),
    ],
)
def test_options_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        lanczos(Counting(torch.ones(10)), torch.ones(10), rng=generator(), **options)


@pytest.mark.parametrize(
    "start",
    [
        torch.zeros(10),
        torch.full((10,), math.nan),
        torch.ones(10, 2),
        torch.ones(10, dtype=torch.int64),
        torch.ones(2, 2, 2),
        torch.ones(0),
        torch.randn(10, 11, generator=generator()),
    ],
    ids=["zero", "nan", "dependent", "integer", "three axes", "empty", "too wide"],
)
def test_bad_start(start: Tensor) -> None:
    with pytest.raises(InputError, match="start"):
        lanczos(lambda v: v, start, rng=generator())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_product_that_is_not_finite(bad: float) -> None:
    with pytest.raises(InputError, match="not finite"):
        lanczos(lambda v: v * bad, torch.ones(10), rng=generator())


def test_product_of_the_wrong_shape() -> None:
    with pytest.raises(InputError, match=r"\(9,\) for \(10,\)"):
        lanczos(lambda v: v[1:], torch.ones(10), rng=generator())
