"""Where searches start: near what a part of the samples has, and never ending elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lsa.landscape import Landscape, flatten, warm_start
from lsa.maths.spectra import eigenpairs
from lsa.probes import lanczos as probe

MANY = warm_start.SHARE * warm_start.LEAST


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(samples: int) -> tuple[Landscape, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x = torch.randn(samples, 5, generator=generator(1), dtype=torch.float64)
    y = torch.randint(0, 3, (samples,), generator=generator(2))
    return Landscape(model, x, y), flatten(model)


def dense(landscape: Landscape, theta: Tensor) -> tuple[Tensor, Tensor]:
    eye = torch.eye(len(theta), dtype=theta.dtype)
    product = landscape.hessian(theta)
    return torch.linalg.eigh(torch.stack([product(e) for e in eye], 1))


def direction(landscape: Landscape, theta: Tensor, largest: int = 2, smallest: int = 1) -> Tensor:
    return warm_start.from_few(landscape, theta, generator(), largest=largest, smallest=smallest)


@pytest.mark.parametrize(("samples", "smallest"), [(MANY - 1, 1), (MANY, 0)])
def test_it_is_the_gradient_where_few_samples_are_too_few_or_as_good(samples, smallest):
    landscape, theta = network(samples)
    found = direction(landscape, theta, smallest=smallest)
    assert torch.equal(found, landscape.gradient(theta))


def test_it_lies_in_both_ends_of_the_spectrum_of_a_sixteenth():
    landscape, theta = network(MANY)
    found = direction(landscape, theta)
    chosen = torch.randperm(MANY, generator=generator())[: warm_start.LEAST]
    _, vectors = dense(landscape.subset(chosen), theta)
    shares = (vectors.T @ found).square()
    more = warm_start.MORE
    ends = torch.cat([shares[: 1 + more], shares[-2 - more :]])
    assert ends[[0, -2, -1]].numpy() == pytest.approx(1.0, abs=0.01)  # a sum of unit vectors
    assert 0.95 * len(ends) < ends.sum() < 1.001 * len(ends)


def test_what_is_found_from_there_are_the_eigenvalues_on_all_samples():
    landscape, theta = network(MANY)
    values, _ = dense(landscape, theta)
    few, _ = dense(landscape.subset(torch.arange(warm_start.LEAST)), theta)
    found = probe.lanczos(
        landscape, theta, generator(), lambda *_: None, k=2, k_min=2, tol=1e-6, density_probes=0,
        split="no",
    )  # fmt: skip
    wanted = torch.cat([values[-2:].flip(0), values[:2].flip(0)])
    assert found.curves["eigenvalue"].y == pytest.approx(wanted.numpy(), rel=1e-9)
    assert abs(few[-1] / values[-1] - 1) > 0.05  # those of the few are others


def test_both_ends_take_fewer_products_from_there():
    """A spectrum as networks have it: few outliers, which the part of the samples shares."""
    landscape, theta = network(MANY)

    def products(near: Tensor) -> int:
        start = eigenpairs.start_vector(theta, generator(3), near)
        found = eigenpairs.lanczos(
            landscape.hessian(theta), start, rng=generator(4), largest=2, confirm=0, tol=1e-3
        )
        assert found.converged
        return found.products

    assert products(direction(landscape, theta)) < products(landscape.gradient(theta))


def test_a_space_hardly_larger_than_what_is_wanted_is_no_obstacle():
    landscape, theta = network(MANY)
    part = landscape.restricted(theta, ["2.bias"])
    at = flatten(part.model)
    found = direction(part, at, largest=2, smallest=1)
    assert found.shape == at.shape and bool(found.isfinite().all())
