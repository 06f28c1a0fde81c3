"""Sums over ten million numbers, of which few are large."""

from __future__ import annotations

import pytest
import torch

from lsa.maths.spaces import LOCAL, Space
from lsa.maths.spectra import eigenpairs
from lsa.maths.spectra.krylov import gram_error, orthogonalise, orthonormal

D = 10_000_000


@pytest.fixture(scope="module")
def steep() -> torch.Tensor:
    """Like the top eigenvector of a transformer: the hundred largest entries are half of it."""
    w = torch.randn(D, generator=torch.Generator().manual_seed(0)) * 1e-4
    w[:: D // 100] += 0.03
    return w


def test_lengths_and_products_are_those_of_float64(steep):
    exact = steep.double()
    length = exact.norm()
    assert float(LOCAL.length(steep)) == pytest.approx(float(length), rel=1e-7)
    other = steep.flip(0) + steep
    size = float(length * other.double().norm())
    assert abs(LOCAL.dot(steep, other) - float(exact @ other.double())) < 3e-7 * size


def test_what_is_orthogonalised_is_orthogonal(steep):
    rows = torch.stack([steep / LOCAL.length(steep).float(), torch.zeros(D)])
    rows[1, ::2] = (2 / D) ** 0.5
    rows[1], _ = orthogonalise(rows[1], rows[:1])
    rows[1] /= float(rows[1].double().norm())
    w, c = orthogonalise(torch.ones(D), rows)
    assert (rows.double() @ w.double()).abs().max() < 1e-6 * w.double().norm()
    assert c == pytest.approx((rows.double() @ torch.ones(D).double()).tolist(), rel=1e-5)


def test_an_orthonormal_basis_is_one_where_a_decomposition_in_float32_is_not(steep):
    V = torch.stack([steep, steep + 0.1 * steep.roll(1), steep.flip(0)])
    rows = orthonormal(V)
    assert len(rows) == 3
    assert gram_error(rows) < 1e-6
    rest, _ = orthogonalise(V[1], rows[:2])
    assert LOCAL.length(rest) < 1e-6 * LOCAL.length(V[1])


def test_a_row_that_depends_on_others_is_left_out_of_a_basis():
    V = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    rows = orthonormal(torch.stack([V[0], V[1], V[0] - 2 * V[1], V[2], 0 * V[0]]))
    assert len(rows) == 3
    assert gram_error(rows) < 1e-6


def test_the_rayleigh_quotient_of_a_steep_vector_is_below_the_largest_eigenvalue(steep):
    """In float32 sums it comes out up to a percent above it."""
    u = (steep.double() / steep.double().norm()).float()

    def matvec(v: torch.Tensor) -> torch.Tensor:
        return 66.0 * u * LOCAL.dot(u, v) + v

    near = steep + 0.01 * torch.randn(D, generator=torch.Generator().manual_seed(1)) / D**0.5
    start = eigenpairs.start_vector(near, torch.Generator().manual_seed(2), near)
    found = eigenpairs.lanczos(
        matvec, start, rng=torch.Generator(), smallest=0, basis=8, confirm=0
    ).largest
    assert found.values[0].item() == pytest.approx(67.0, rel=1e-6)
    assert found.vectors[:, 0].double().norm().item() == pytest.approx(1, abs=1e-6)


def test_parts_of_one_vector_are_drawn_apart():
    parts = [Space(part=i, parts=2) for i in range(2)]
    like = torch.empty(1000)
    drawn = [space.normal(like, torch.Generator().manual_seed(3)) for space in parts]
    assert abs(float(drawn[0] @ drawn[1])) < 150 and not torch.equal(*drawn)
