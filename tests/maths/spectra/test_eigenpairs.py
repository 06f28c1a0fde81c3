"""Lanczos against closed forms, dense eigenvalues and SciPy's ARPACK."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from spectra import Counting, generator, hessian_like, normal, rotation, symmetric
from torch import Tensor

from lsa.maths.spectra.eigenpairs import Extremes, lanczos, start_vector
from lsa.maths.spectra.overlap import subspace_overlap
from lsa.runtime.errors import InputError


def arpack_products(spectrum: Tensor, k: int, which: str, tol: float) -> int:
    count = Counting(spectrum)
    d = len(spectrum)

    def product(x: np.ndarray) -> np.ndarray:
        return count(torch.from_numpy(np.ascontiguousarray(x.ravel()))).numpy()

    operator = LinearOperator((d, d), matvec=product, dtype=np.float64)  # pyright: ignore
    eigsh(operator, k=k, which=which, tol=tol, v0=normal(d, seed=1).numpy())
    return count.calls


def check_pairs(A: Tensor, result: Extremes, tol: float) -> None:
    """Values, vectors and residuals are what they claim, against dense eigenvalues."""
    exact = torch.linalg.eigvalsh(A)
    scale = float(exact.abs().max())
    for pairs, truth in ((result.largest, exact.flip(0)), (result.smallest, exact)):
        k = len(pairs.values)
        assert torch.allclose(pairs.values, truth[:k], rtol=tol, atol=tol * 0.01 * scale)
        Y = pairs.vectors.double()
        assert torch.allclose(Y.T @ Y, torch.eye(k, dtype=torch.float64), atol=1e-10)
        residuals = (A @ Y - Y * pairs.values).norm(dim=0)
        assert torch.allclose(residuals, pairs.residuals, rtol=1e-6, atol=1e-12 * scale)
        assert pairs.converged.all()
    assert result.converged


# --- independent oracles ------------------------------------------------------------------------


def test_all_ritz_values_are_the_dense_hessian_of_a_small_network() -> None:
    x, y = normal(40, 3, seed=1), torch.randint(0, 4, (40,), generator=generator(2))
    theta = 0.7 * normal(44, seed=3)  # 3 → 5 → 4, with biases

    def loss(theta: Tensor) -> Tensor:
        W1, b1, W2, b2 = theta.split([15, 5, 20, 4])
        hidden = torch.tanh(F.linear(x, W1.view(5, 3), b1))
        return F.cross_entropy(F.linear(hidden, W2.view(4, 5), b2), y)

    def product(v: Tensor) -> Tensor:
        return torch.autograd.functional.hvp(loss, theta, v)[1]

    H = torch.autograd.functional.hessian(loss, theta)
    assert isinstance(H, Tensor)
    d = len(theta)
    result = lanczos(product, normal(d), rng=generator(), largest=d - 10, smallest=10)
    values = torch.cat([result.smallest.values, result.largest.values.flip(0)])
    assert torch.allclose(values, torch.linalg.eigvalsh(H), atol=1e-8, rtol=0)
    assert result.converged and result.products == d
    assert result.asymmetry < 1e-12 and result.orthogonality < 1e-12


@pytest.mark.parametrize("block", [1, 2, 3])
@pytest.mark.parametrize(("largest", "smallest"), [(1, 1), (3, 0), (0, 2), (4, 2)])
def test_random_symmetric_matrix(block: int, largest: int, smallest: int) -> None:
    A = symmetric(150)
    options = {"largest": largest, "smallest": smallest, "tol": 1e-6}
    check_pairs(A, lanczos(Counting(A), normal(150, block), rng=generator(), **options), 1e-6)


def test_agrees_with_arpack_on_a_large_sparse_operator() -> None:
    d = 3000
    S = scipy.sparse.random(d, d, 2e-3, random_state=0, format="csr")
    S = (S + S.T + scipy.sparse.diags(np.linspace(-1, 3, d))).tocsr()

    def product(v: Tensor) -> Tensor:
        return torch.from_numpy(S @ v.numpy())

    result = lanczos(product, normal(d), rng=generator(), largest=3, smallest=3, tol=1e-5, basis=60)
    assert result.converged
    top = eigsh(S, k=3, which="LA", tol=1e-10, return_eigenvectors=False)
    bottom = eigsh(S, k=3, which="SA", tol=1e-10, return_eigenvectors=False)
    assert np.allclose(result.largest.values.numpy(), np.sort(top)[::-1], rtol=1e-5)
    assert np.allclose(result.smallest.values.numpy(), np.sort(bottom), rtol=1e-5)


@pytest.mark.parametrize(("largest", "smallest"), [(1, 0), (3, 0), (10, 0), (3, 1), (10, 1)])
def test_no_more_products_than_arpack(largest: int, smallest: int) -> None:
    spectrum = hessian_like(2000)
    matvec = Counting(spectrum)
    options = {"largest": largest, "smallest": smallest, "tol": 1e-3}
    result = lanczos(matvec, normal(2000, seed=1), rng=generator(), **options)
    theirs = sum(
        arpack_products(spectrum, k, which, 1e-3)
        for k, which in ((largest, "LA"), (smallest, "SA"))
        if k
    )
    assert result.converged
    assert result.products == matvec.calls <= 1.1 * theirs


def test_planted_spectrum_at_both_ends() -> None:
    spectrum = hessian_like(2000)
    result = lanczos(Counting(spectrum), normal(2000), rng=generator(), largest=11, tol=1e-4)
    truth = spectrum.sort(descending=True).values
    assert torch.allclose(result.largest.values[:10], truth[:10], rtol=1e-6)
    assert float(result.smallest.values[0]) == pytest.approx(-3, rel=1e-6)
    assert int((result.largest.values > 10).sum()) == 10
    # Lanczos never overestimates an extreme
    assert (result.largest.values <= truth[:11] + 1e-12).all()
    assert result.smallest.values[0] >= -3 - 1e-12


# --- invariances --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "shift"), [(1, 0), (-2.5, 0), (1e-8, 0), (1e8, 0), (1, 7), (-3, -4)]
)
def test_scale_and_shift(scale: float, shift: float) -> None:
    A = symmetric(80)
    B = scale * A + shift * torch.eye(80, dtype=torch.float64)
    result = lanczos(Counting(B), normal(80), rng=generator(), largest=2, smallest=2, tol=1e-5)
    check_pairs(B, result, 1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_orthogonal_conjugation(seed: int) -> None:
    spectrum, Q = hessian_like(120, [9.0, 5, 4]), rotation(120, seed)
    diagonal, rotated = Counting(spectrum), Counting((Q * spectrum) @ Q.T)
    v = normal(120, seed=9)
    options = {"largest": 3, "smallest": 1, "tol": 1e-6, "confirm": 0}
    one = lanczos(diagonal, v, rng=generator(), **options)
    two = lanczos(rotated, Q @ v, rng=generator(), **options)
    assert one.products == two.products  # the Krylov process does not see the basis
    assert torch.allclose(one.largest.values, two.largest.values, rtol=1e-10)
    assert torch.allclose(one.smallest.values, two.smallest.values, rtol=1e-8)
    cosines = ((Q @ one.largest.vectors) * two.largest.vectors).sum(0).abs()
    assert torch.allclose(cosines, torch.ones(3, dtype=torch.float64), atol=1e-8)


# --- memory, blocks, breakdown ------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 2])
def test_thick_restart_finds_the_same_pairs_within_twenty_vectors(block: int) -> None:
    A = symmetric(300)
    start = normal(300, block)
    options = {"largest": 3, "smallest": 2, "tol": 1e-5}
    free = lanczos(Counting(A), start, rng=generator(), basis=300, **options)
    bound = lanczos(Counting(A), start, rng=generator(), basis=20, **options)
    check_pairs(A, free, 1e-5)
    check_pairs(A, bound, 1e-5)
    for one, two in ((free.largest, bound.largest), (free.smallest, bound.smallest)):
        assert torch.allclose(one.values, two.values, rtol=1e-9)
        assert subspace_overlap(one.vectors, two.vectors) > 1 - 1e-8
    assert free.products <= bound.products
    assert bound.orthogonality < 1e-12


def test_a_block_resolves_a_multiplicity_that_one_vector_cannot() -> None:
    spectrum = torch.cat([torch.tensor([5.0, 5, 3]), torch.linspace(0, 1, 500)]).double()
    options = {"largest": 2, "smallest": 0, "confirm": 0}
    one = lanczos(Counting(spectrum), normal(503), rng=generator(), **options)
    two = lanczos(Counting(spectrum), normal(503, 2), rng=generator(), **options)
    assert one.largest.values.tolist() == pytest.approx([5, 3], rel=1e-5)  # a limit of one vector
    assert two.largest.values.tolist() == pytest.approx([5, 5], rel=1e-5)
    plane = torch.eye(503, dtype=torch.float64)[:, :2]
    assert subspace_overlap(two.largest.vectors, plane) == pytest.approx(1, abs=1e-5)


def test_confirmation_resolves_it_too() -> None:
    spectrum = torch.cat([torch.tensor([5.0, 5, 3]), torch.linspace(0, 1, 500)]).double()
    result = lanczos(Counting(spectrum), normal(503), rng=generator(), largest=2, smallest=0)
    assert result.converged
    assert result.largest.values.tolist() == pytest.approx([5, 5], rel=1e-5)


def test_no_duplicates() -> None:
    """Every value once: a lost orthogonality would return the largest again and again."""
    spectrum = hessian_like(283, [6.0, 3, 1.5])
    result = lanczos(Counting(spectrum), normal(283), rng=generator(), largest=20, basis=100)
    gaps = -result.largest.values.diff()
    assert result.converged
    assert torch.allclose(
        result.largest.values, spectrum.sort(descending=True).values[:20], rtol=1e-3
    )
    assert float(gaps.min()) > 1e-6


def test_breakdown_in_an_invariant_subspace() -> None:
    """A start inside an invariant subspace: the rest is found through fresh random directions."""
    spectrum = torch.arange(1.0, 31).double()
    start = torch.zeros(30).double()
    start[3:6] = 1
    result = lanczos(Counting(spectrum), start, rng=generator(), largest=2, smallest=2)
    assert result.converged
    assert torch.allclose(result.largest.values, torch.tensor([30.0, 29]).double(), rtol=1e-3)
    assert torch.allclose(result.smallest.values, torch.tensor([1.0, 2]).double(), rtol=1e-3)


@pytest.mark.parametrize(
    "spectrum",
    [
        [0.0] * 50,
        [3.0] * 50,
        [1.0] + [0.0] * 49,
        [-1.0] * 25 + [1.0] * 25,
        [2.0, 2, 2] + [1.0] * 47,
    ],
    ids=["zero", "multiple of the identity", "rank one", "two values", "triple"],
)
def test_few_distinct_eigenvalues(spectrum: list[float]) -> None:
    values = torch.tensor(spectrum).double()
    Q = rotation(50)
    result = lanczos(
        Counting((Q * values) @ Q.T), normal(50), rng=generator(), largest=50, smallest=0
    )
    assert result.converged and result.products == 50
    assert result.orthogonality < 1e-13
    truth = values.sort(descending=True).values
    assert torch.allclose(result.largest.values, truth, atol=1e-12)
    early = lanczos(
        Counting((Q * values) @ Q.T), normal(50), rng=generator(), largest=1, smallest=1
    )
    assert early.converged and early.products < 12
    assert float(early.largest.values[0]) == pytest.approx(float(truth[0]), abs=1e-12)
    assert float(early.smallest.values[0]) == pytest.approx(float(truth[-1]), abs=1e-12)


def test_zero_end_of_a_semidefinite_matrix_converges() -> None:
    X = normal(400, 60)
    A = X @ X.T / 60
    result = lanczos(Counting(A), normal(400), rng=generator(), largest=2, smallest=2)
    assert result.converged
    assert (result.smallest.values.abs() <= 1e-3 * 0.01 * float(result.largest.values[0])).all()


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_dimensions(d: int, dtype: torch.dtype) -> None:
    spectrum = torch.tensor([-4.0, 1, 2])[:d].to(dtype)
    result = lanczos(Counting(spectrum), normal(d, dtype=dtype), rng=generator(), smallest=d - 1)
    assert result.converged and result.products == d
    assert float(result.largest.values[0]) == pytest.approx(float(spectrum.max()), rel=1e-6)
    assert result.largest.vectors.dtype == dtype


def test_whole_spectrum_when_the_basis_can_span_the_space() -> None:
    A = symmetric(90)
    result = lanczos(Counting(A), normal(90), rng=generator(), largest=45, smallest=45)
    check_pairs(A, result, 1e-12)


# --- precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tol", [1e-3, 1e-4])
def test_noisy_float32_product_still_converges(tol: float) -> None:
    spectrum = hessian_like(2000)
    noise, rng = 1e-6 * 100 / math.sqrt(2000), generator(3)  # ‖noise‖ = 1e-6 ‖A‖ per product

    def product(v: Tensor) -> Tensor:
        return (spectrum * v.double() + noise * torch.randn(2000, generator=rng)).float()

    start = normal(2000, dtype=torch.float32)
    result = lanczos(product, start, rng=generator(), largest=3, tol=tol)
    assert result.converged and result.products < 60
    Y = result.largest.vectors.double()
    residuals = (spectrum[:, None] * Y - Y * result.largest.values).norm(dim=0)
    # the recurrence cannot see the noise of its own products: at most 1e-6 ‖A‖ √products
    slack = 1e-6 * 100 * math.sqrt(result.products)
    assert (residuals <= tol * result.largest.values + slack).all()
    assert result.orthogonality < 1e-5
    assert 1e-9 < result.asymmetry < 1e-5


@pytest.mark.parametrize(
    ("basis", "product"), [(torch.float32, torch.float64), (torch.float64, torch.float32)]
)
def test_mixed_precision(basis: torch.dtype, product: torch.dtype) -> None:
    spectrum = hessian_like(1000)
    result = lanczos(
        lambda v: spectrum.to(product) * v.to(product), normal(1000, dtype=basis), rng=generator()
    )
    assert result.converged
    assert result.largest.vectors.dtype == basis
    assert float(result.largest.values[0]) == pytest.approx(100, rel=1e-5)


def test_unreachable_tolerance_is_reported_and_not_claimed() -> None:
    spectrum = hessian_like(200).float()
    start = normal(200, dtype=torch.float32)
    result = lanczos(
        Counting(spectrum), start, rng=generator(), tol=1e-12, basis=40, max_products=120
    )
    assert not result.converged
    assert result.products == 120


def test_a_warm_start_finds_a_new_top_eigenvector_orthogonal_to_the_old() -> None:
    """The old top is the second now, and the new one has no share of the direction given."""
    A = hessian_like(2000, outliers=[100.0, 60])
    old = torch.zeros(len(A), dtype=A.dtype)
    old[1] = old[-1] = 1  # the old largest and the smallest
    for seed in range(5):
        rng = generator(seed)
        start = start_vector(A, rng, old)
        found = lanczos(Counting(A), start, rng=rng, confirm=0)
        check_pairs(torch.diag(A), found, 1e-3)
        assert found.largest.values[0].item() == pytest.approx(100, rel=1e-3)


def test_a_cold_start_is_the_random_vector_and_a_warm_one_draws_the_same() -> None:
    like, near = torch.zeros(50), torch.full((50,), 3.0)
    cold = start_vector(like, generator())
    assert torch.equal(cold, torch.randn(50, generator=generator()))
    rng = generator()
    warm = start_vector(like, rng, near)
    assert torch.allclose(warm - near / near.norm(), cold / cold.norm())
    after = generator()
    torch.randn(50, generator=after)
    assert torch.equal(rng.get_state(), after.get_state())


def test_a_direction_of_no_length_is_none() -> None:
    """As is the gradient at a minimum."""
    zero = torch.zeros(5)
    assert torch.equal(start_vector(zero, generator(), zero), start_vector(zero, generator()))


@pytest.mark.parametrize("near", [torch.ones(4), torch.full((5,), math.nan)])
def test_a_direction_to_start_from_must_fit(near: Tensor) -> None:
    with pytest.raises(InputError, match="direction to start from"):
        start_vector(torch.zeros(5), generator(), near)
