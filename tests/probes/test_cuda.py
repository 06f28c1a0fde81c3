"""Every probe measures on a GPU what it measures on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import test_contract as contract
import torch
from test_ranks import numbers

from lsa import probe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

NETWORKS: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": [12]},
    "simple_cnn": {"width": 8, "rates": (0.05, 0.02)},
    "resnet20": {"norm": "group", "width": 8, "rates": (0.05, 0.02)},
}


@pytest.fixture(scope="module", params=NETWORKS)
def both(request) -> list[dict[str, Any]]:
    """In float64: what is then unequal is no rounding that a probe has amplified."""
    network, shape = request.param, NETWORKS[request.param]
    return [contract.inputs(torch.float64, device, network, **shape) for device in ("cpu", "cuda")]


@pytest.mark.parametrize("name", sorted(probe.modules()))
def test_a_gpu_measures_what_the_cpu_does(name, both):
    wanted, found = (contract.run(name, inputs) for inputs in both)
    assert numbers(found) == pytest.approx(numbers(wanted), rel=1e-5, abs=1e-8, nan_ok=True)
    assert found.converged == wanted.converged
    for key, curve in wanted.curves.items():
        np.testing.assert_allclose(found.curves[key].y, curve.y, rtol=1e-5, atol=1e-8)
