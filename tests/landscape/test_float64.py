"""A landscape in float64, and the line that is said where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lsa.landscape import Landscape
from lsa.landscape.float64 import in_float64
from lsa.probes.perturbation import perturbation
from lsa.probes.symmetry_audit import symmetry_audit
from lsa.runtime.errors import InputError

X, Y = torch.linspace(-1, 1, 24).view(6, 4), torch.arange(6) % 3


class Float32Alone(nn.Linear):
    """As fused kernels are."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise RuntimeError("expected Float32, got Double")
        return super().forward(x)


def test_the_same_landscape():
    with torch.random.fork_rng():
        model = nn.Linear(4, 3)
    landscape = Landscape(model, X, Y)
    fine = in_float64(landscape)
    assert fine.theta.dtype == torch.float64 and fine.n_samples == 6
    assert fine.loss(fine.theta) == pytest.approx(landscape.loss(landscape.theta), rel=1e-6)


@pytest.mark.parametrize("probe", [perturbation, symmetry_audit])
def test_a_network_without_float64_is_told_in_one_line(probe):
    with torch.random.fork_rng():
        landscape = Landscape(Float32Alone(4, 3), X, Y)
    with pytest.raises(InputError, match="float64, which the network cannot") as caught:
        probe(landscape, landscape.theta, torch.Generator().manual_seed(0), lambda *_: None)
    assert "expected Float32, got Double" in str(caught.value) and "\n" not in str(caught.value)
