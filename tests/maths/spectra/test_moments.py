"""Second moments of two operators: exact on a subspace, unbiased with true errors on the rest."""

from __future__ import annotations

import pytest
import torch
from spectra import interval
from torch import Tensor

from lsa.maths.spectra.moments import ProductMoments, product_moments
from lsa.runtime.errors import InputError

D = 40


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def symmetric(seed: int) -> Tensor:
    A = torch.randn(D, D, generator=generator(seed), dtype=torch.float64)
    return A + A.T + 5 * torch.eye(D, dtype=torch.float64)


A, B = symmetric(1), symmetric(2)
TRUTH = {
    "trace_a": A.trace().item(),
    "trace_ab": (A @ B).trace().item(),
    "norm_a": A.norm().item(),
    "norm_b": B.norm().item(),
    "mean_b": ((A @ B).trace() / A.trace()).item(),
    "alignment": ((A @ B).trace() / A.norm() / B.norm()).item(),
}


def measure(k: int, probes: int, seed: int = 0) -> ProductMoments:
    Q = torch.linalg.qr(torch.randn(D, D, generator=generator(9), dtype=torch.float64)).Q[:, :k]
    return product_moments(lambda v: A @ v, lambda v: B @ v, Q, rng=generator(seed), probes=probes)


def test_the_whole_space_as_subspace_is_exact():
    found = measure(D, probes=3)
    for name, value in TRUTH.items():
        assert getattr(found, name).value == pytest.approx(value, rel=1e-10)
        assert getattr(found, name).error == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("k", [0, 8])
def test_intervals_cover_the_truth(k, record_property):
    runs = [measure(k, probes=20, seed=seed) for seed in range(200)]
    for name, value in TRUTH.items():
        intervals = [interval(getattr(run, name)) for run in runs]
        covered = sum(low <= value <= high for low, high in intervals)
        label = f"{name} of two operators, {k} known eigenvectors"
        record_property("coverage", [label, "probes", "95 %", covered / 200, 200])
        # 95 % of 200 is 190 ± 3.1; the ratios and roots are biased a little
        assert covered >= 177, name


def test_an_operator_is_aligned_with_itself():
    Q = torch.zeros(D, 0, dtype=torch.float64)
    found = product_moments(lambda v: A @ v, lambda v: 3 * (A @ v), Q, rng=generator(), probes=2)
    assert found.alignment.value == pytest.approx(1, rel=1e-12)


def test_refusals():
    Q = torch.ones(D, 1, dtype=torch.float64)
    with pytest.raises(InputError, match="orthonormal"):
        product_moments(lambda v: v, lambda v: v, Q, rng=generator())
    with pytest.raises(InputError, match="probes=0"):
        product_moments(lambda v: v, lambda v: v, Q / Q.norm(), rng=generator(), probes=0)
