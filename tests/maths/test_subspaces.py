"""Random subspaces: exact norms and adjoints, then optima known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from scipy import linalg
from torch import Tensor

from lsa.maths.subspaces import KINDS, Projection, fwht, make_projection
from lsa.runtime.errors import InputError

SHAPES = [(1, 1), (2, 1), (5, 3), (5, 5), (100, 64), (777, 300), (1024, 256)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def projection(kind: str, dimension: int, d: int, seed: int = 0) -> Projection:
    return make_projection(kind, dimension, d, generator(seed), dtype=torch.float64)


def matrix(p: Projection) -> Tensor:
    return torch.stack([p.expand(e) for e in torch.eye(p.d, dtype=torch.float64)], dim=1)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def minimise(loss_and_gradient: Callable[[Tensor], tuple[Tensor, Tensor]], z: Tensor) -> Tensor:
    """L-BFGS to rounding, on an objective that gives its own gradient."""
    z = z.clone()
    optimizer = torch.optim.LBFGS(
        [z],
        max_iter=2000,
        history_size=50,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        loss, z.grad = loss_and_gradient(z.detach())
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return z.detach()


# --- Walsh–Hadamard transform ---------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 8, 32, 64, 1024])
def test_fwht_is_multiplication_by_the_hadamard_matrix(length: int) -> None:
    x = normal(3, length)
    H = torch.from_numpy(linalg.hadamard(length)).double()
    assert (fwht(x) - x @ H).abs().max() <= 1e-14 * length * x.abs().max()


@pytest.mark.parametrize("length", [1, 2, 16, 4096])
def test_fwht_twice_multiplies_by_the_length(length: int) -> None:
    x = normal(2, 3, length)
    assert (fwht(fwht(x)) - length * x).abs().max() <= 1e-13 * length


@pytest.mark.parametrize("length", [0, 3, 12])
def test_fwht_refuses_other_lengths(length: int) -> None:
    with pytest.raises(InputError, match="power of two"):
        fwht(torch.zeros(length))


# --- the projection as a linear map ---------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dimension", "d"), SHAPES)
def test_restrict_is_the_transpose_of_expand(kind: str, dimension: int, d: int) -> None:
    p = projection(kind, dimension, d)
    g = normal(dimension)
    assert p.expand(torch.ones(d, dtype=torch.float64)).shape == (dimension,)
    assert torch.allclose(p.restrict(g), matrix(p).T @ g, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize(("dimension", "d"), SHAPES)
def test_columns_have_unit_norm(kind: str, dimension: int, d: int) -> None:
    norms = matrix(projection(kind, dimension, d)).norm(dim=0)
    assert (norms - 1).abs().max() < 1e-13


@pytest.mark.parametrize(("dimension", "d"), [(1024, 1024), (1024, 200), (96, 32), (7, 1)])
def test_fastfood_columns_have_unit_norm_for_whole_blocks(dimension: int, d: int) -> None:
    norms = matrix(projection("fastfood", dimension, d)).norm(dim=0)
    assert (norms - 1).abs().max() < 1e-13


@pytest.mark.parametrize(("dimension", "d"), [(777, 777), (1000, 300), (4000, 500)])
def test_fastfood_norms_scatter_as_predicted_when_cut(dimension: int, d: int) -> None:
    norms = torch.cat(
        [matrix(projection("fastfood", dimension, d, seed)).norm(dim=0) for seed in range(4)]
    )
    L = 2 ** math.ceil(math.log2(d))
    r = dimension % L / L
    predicted = L / (2 * dimension) * math.sqrt(2 * r * (1 - r) / (L + 2))
    assert predicted < 1 / (2 * math.sqrt(dimension))
    # More than 1200 norms, so 2 % error of their spread; 25 % allows for their dependence.
    assert (norms - 1).square().mean().sqrt().item() == pytest.approx(predicted, rel=0.25)


@pytest.mark.parametrize(("kind", "factor"), [("dense", 1), ("sparse", 1), ("fastfood", 2)])
def test_columns_are_as_orthogonal_as_stated(kind: str, factor: float) -> None:
    # E cos² is 1/D for independent columns; twice that for fastfood, as Var G² = 2.
    P = matrix(projection(kind, 4096, 200))
    off = (P.T @ P)[~torch.eye(200, dtype=torch.bool)]
    # At least 255 independent values: 9 % error of a mean square, 4 of them allowed.
    assert off.square().mean().item() == pytest.approx(factor / 4096, rel=0.36)


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_are_kept_on_average(kind: str) -> None:
    z = normal(64)
    ratios = torch.stack(
        [
            projection(kind, 4096, 64, seed).expand(z).square().sum() / z.square().sum()
            for seed in range(20)
        ]
    )
    # Var |Pz|²/|z|² ≤ 2 E cos² · (1 − …) ≤ 4/D per draw; 20 draws, five standard errors.
    assert abs(ratios.mean().item() - 1) < 5 * math.sqrt(4 / 4096 / 20)


def test_sparse_density_is_one_over_root_dimension() -> None:
    nonzero = int((matrix(projection("sparse", 2500, 400)) != 0).sum())
    expected = 400 * 2500 / 50
    assert abs(nonzero - expected) < 5 * math.sqrt(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_full_dimension_spans_everything(kind: str) -> None:
    # The sparse kind may draw linearly dependent columns when D is tiny, not at this size.
    assert torch.linalg.matrix_rank(matrix(projection(kind, 100, 100))) == 100


# --- construction ---------------------------------------------------------------------------------


def test_a_dense_matrix_that_does_not_fit_is_regenerated_alike() -> None:
    def make(memory: int) -> Projection:
        return make_projection("dense", 300_000, 90, generator(), memory=memory)

    stored, regenerated = make(2**30), make(0)
    z, g = normal(90).float(), normal(300_000).float()
    assert torch.equal(stored.expand(z), regenerated.expand(z))
    assert torch.equal(stored.restrict(g), regenerated.restrict(g))
    assert stored.restrict(stored.expand(z)).shape == (90,)


@pytest.mark.parametrize("kind", KINDS)
def test_the_generator_decides_and_global_state_is_untouched(kind: str) -> None:
    before = torch.get_rng_state()
    one, same, other = (matrix(projection(kind, 50, 7, seed)) for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_have_the_type_asked_for(kind: str, dtype: torch.dtype) -> None:
    p = make_projection(kind, 40, 6, generator(), dtype=dtype)
    assert p.expand(torch.ones(6, dtype=dtype)).dtype == dtype
    assert p.restrict(torch.ones(40, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("d", [0, 11])
def test_dimension_out_of_range_is_refused(d: int) -> None:
    with pytest.raises(InputError, match=f"d={d} .*choose 1 ≤ d ≤ 10"):
        make_projection("dense", 10, d, generator())


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(InputError, match="dense, sparse, fastfood"):
        make_projection("gaussian", 10, 2, generator())


# --- training in the subspace ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_origin_is_reproduced_exactly(kind: str) -> None:
    theta = normal(1000).float()
    p = make_projection(kind, 1000, 30, generator())
    assert torch.equal(theta + p.expand(torch.zeros(30)), theta)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_in_the_subspace(kind: str) -> None:
    theta, z, p = normal(60), normal(9, seed=2), projection(kind, 60, 9)
    X = normal(40, 60, seed=3)

    def loss(t: Tensor) -> Tensor:
        return F.softplus(X @ t).mean()

    at = (theta + p.expand(z)).requires_grad_()
    gradient = p.restrict(torch.autograd.grad(loss(at), at)[0])
    h = 1e-5
    steps = h * torch.eye(9, dtype=torch.float64)
    central = [
        (loss(theta + p.expand(z + e)) - loss(theta + p.expand(z - e))) / (2 * h) for e in steps
    ]
    # Error h² L‴/6 with |L‴| < 0.1 |x·p|³ ≲ 10, plus rounding 1e-16/h.
    assert torch.allclose(torch.stack(central), gradient, rtol=0, atol=1e-9)
    through = torch.func.grad(lambda w: loss(theta + p.expand(w)))(z)
    assert torch.allclose(through, gradient, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_least_squares_reaches_the_projected_minimum(kind: str) -> None:
    A, b, theta, p = (
        normal(80, 50),
        normal(80, seed=2),
        normal(50, seed=3),
        projection(kind, 50, 12),
    )

    def objective(z: Tensor) -> tuple[Tensor, Tensor]:
        residual = A @ (theta + p.expand(z)) - b
        return residual.square().sum() / 2, p.restrict(A.T @ residual)

    found = objective(minimise(objective, torch.zeros(12, dtype=torch.float64)))[0]
    AP = A @ matrix(p)
    best = torch.linalg.lstsq(AP, (b - A @ theta)[:, None]).solution[:, 0]
    exact = (AP @ best + A @ theta - b).square().sum() / 2
    assert found.item() == pytest.approx(exact.item(), rel=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_all_dimensions_reach_the_direct_optimum(kind: str) -> None:
    X, theta = normal(100, 16), normal(16, seed=2)
    y = (X @ normal(16, seed=3) + normal(100, seed=4) > 0).double()

    def direct(t: Tensor) -> tuple[Tensor, Tensor]:
        residual = torch.sigmoid(X @ t) - y
        loss = F.binary_cross_entropy_with_logits(X @ t, y) + 0.05 * t.square().sum()
        return loss, X.T @ residual / len(y) + 0.1 * t

    # A sparse P this small, with four entries per column, often has dependent columns: draw again.
    drawn = (projection(kind, 16, 16, seed) for seed in range(20))
    p = next(p for p in drawn if torch.linalg.cond(matrix(p)) < 100)

    def within(z: Tensor) -> tuple[Tensor, Tensor]:
        loss, gradient = direct(theta + p.expand(z))
        return loss, p.restrict(gradient)

    best = direct(minimise(direct, theta))[0]
    assert within(torch.zeros(16, dtype=torch.float64))[0] > best + 0.1
    reached = within(minimise(within, torch.zeros(16, dtype=torch.float64)))[0]
    assert reached.item() == pytest.approx(best.item(), abs=1e-9)
