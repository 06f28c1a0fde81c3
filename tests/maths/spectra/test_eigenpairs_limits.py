"""Lanczos where it could claim what it did not find, and at the limits of its inputs."""

from __future__ import annotations

import math

import pytest
import torch
from spectra import Counting, generator, hessian_like, normal, rotation, symmetric
from torch import Tensor

from lsa.maths.spectra.eigenpairs import CONFIRM, lanczos
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


def like_a_layer_norm() -> Tensor:
    """Two eigenvalues above the rest, as one layer of a pretrained encoder has them."""
    outer = torch.tensor([0.1574, 0.0987, 0.0460, 0.0308, 0.0268, 0.0245, -0.0228])
    return torch.cat([outer.double(), torch.linspace(1, -1, 761).double() ** 3 / 50])


@pytest.mark.parametrize("seed", [27, 45, 102, 201, 226, 364])
def test_a_loose_tolerance_does_not_end_the_search_on_the_second_eigenvalue(seed: int) -> None:
    """Random starts of which the search without confirmation ends on the second."""
    spectrum = like_a_layer_norm()
    options = {"smallest": 0, "tol": 0.05}
    found = []
    for confirm in (0, CONFIRM):
        rng = generator(seed)
        start = torch.randn(768, generator=rng, dtype=torch.float64)
        found.append(lanczos(Counting(spectrum), start, rng=rng, confirm=confirm, **options))
    hasty, careful = found
    assert hasty.converged and hasty.largest.values.tolist() == pytest.approx([0.0987], rel=0.01)
    assert careful.converged
    assert careful.largest.values.tolist() == pytest.approx([0.1574], rel=0.01)


def test_at_a_loose_tolerance_confirmation_takes_two_products_more() -> None:
    spectrum = like_a_layer_norm()
    for tol, more in ((0.01, CONFIRM + 2), (1e-3, CONFIRM)):
        products = [
            lanczos(Counting(spectrum), normal(768), rng=generator(), tol=tol, **options).products
            for options in ({"smallest": 0, "confirm": 0}, {"smallest": 0})
        ]
        assert products[1] - products[0] == more


# --- multiple eigenvalues -------------------------------------------------------------------------


def multiple(copies: int, value: float, rest: Tensor) -> Tensor:
    return torch.cat([torch.full((copies,), value, dtype=torch.float64), rest.double()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("spectrum", "k"),
    [
        (multiple(10, 5.0, torch.linspace(0, 1, 1000)), 10),
        (multiple(4, 2.0, torch.linspace(0, 1, 1000)), 4),
        (multiple(40, 1 / 11, torch.zeros(400)), 12),
    ],
    ids=["ten of 5", "four of 2", "softmax regression at 0"],
)
def test_every_copy_of_a_multiple_eigenvalue_or_no_claim(
    spectrum: Tensor, k: int, dtype: torch.dtype
) -> None:
    claimed = 0
    for seed in range(6):
        start = normal(len(spectrum), seed=seed, dtype=dtype)
        found = lanczos(
            Counting(spectrum.to(dtype)), start, rng=generator(seed), largest=k, smallest=0
        )
        claimed += found.converged
        if found.converged:
            assert torch.allclose(found.largest.values, spectrum[:k], rtol=1e-5)
    assert claimed >= 5


def test_a_lower_end_of_high_multiplicity() -> None:
    spectrum = -multiple(5, 5.0, torch.linspace(0.5, 1, 1000))
    found = lanczos(Counting(spectrum), normal(1005), rng=generator(), largest=1, smallest=5)
    assert found.converged
    assert torch.allclose(found.smallest.values, spectrum[:5], rtol=1e-5)


def test_three_pairs_without_multiples_cost_three_products_more() -> None:
    """No more than the search for missed eigenvalues has cost: at most 15 % of the products."""
    for d, seed in ((2000, 0), (2000, 1), (20_000, 2)):
        products = []
        for confirm in (0, CONFIRM):
            matvec = Counting(hessian_like(d))
            start = normal(d, seed=seed)
            lanczos(matvec, start, rng=generator(), largest=3, smallest=0, confirm=confirm)
            products.append(matvec.calls)
        assert products[1] - products[0] == 3


def test_a_basis_without_room_for_further_directions_claims_nothing() -> None:
    spectrum = multiple(6, 5.0, torch.linspace(0, 1, 500))
    options = {"largest": 6, "smallest": 0, "basis": 10, "max_products": 400}
    found = lanczos(Counting(spectrum), normal(506), rng=generator(), **options)
    complete = torch.allclose(found.largest.values, spectrum[:6], rtol=1e-3)
    assert complete or not found.converged


# --- eigenvalues beside much larger ones ----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("d", [80, 300])
def test_a_spread_of_1e12_is_not_claimed_at_its_lower_end(d, sign, dtype) -> None:
    spectrum = torch.logspace(-2, 10, d, dtype=torch.float64)
    spectrum[: d // 3] *= sign
    Q = rotation(d)
    A = ((Q * spectrum) @ Q.T).to(dtype)
    found = lanczos(Counting((A + A.T) / 2), normal(d, dtype=dtype), rng=generator())
    assert found.largest.converged.all()
    assert float(found.largest.values[0]) == pytest.approx(1e10, rel=1e-5)
    (note,) = found.shortfall("H") or [""]
    right = float(found.smallest.values[0]) == pytest.approx(float(spectrum.min()), rel=1e-3)
    assert right or (not found.converged and "not told from zero" in note)
    assert not found.told_from_zero(smallest=True) or right


def test_a_small_negative_end_is_found_to_its_own_size() -> None:
    """−1e-6 of the norm: by interlacing no zero, so its residual must be smaller than it."""
    spectrum = torch.cat([torch.tensor([1.0, 0.3, -1e-6]).double(), torch.zeros(400).double()])
    found = lanczos(Counting(spectrum), normal(403), rng=generator())
    assert found.converged and found.told_from_zero(smallest=True)
    assert float(found.smallest.values[0]) == pytest.approx(-1e-6, rel=1e-2)


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
