"""Every probe on two ranks measures what it measures in one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import test_contract as contract
import torch
from two_ranks import on_two_ranks

from lsa import probe
from lsa.landscape.sharded import Shares
from lsa.probe import Result

NAMES = sorted(probe.modules())


def inputs() -> dict[str, Any]:
    """In float64: what is then unequal is no rounding that a probe has amplified."""
    return contract.inputs(torch.float64)


def measured() -> dict[str, Result]:
    given = inputs()
    assert isinstance(given["landscape"].data, Shares)
    return {name: contract.run(name, given) for name in NAMES}


@pytest.fixture(scope="module")
def together() -> list[dict[str, Result]]:
    return on_two_ranks(measured)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return inputs()


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_measure_what_one_process_does(name, together, alone):
    expected, (first, second) = contract.run(name, alone), (each[name] for each in together)
    assert numbers(first) == numbers(second), "ranks that differ would part ways"
    assert first.notes == expected.notes and first.converged == expected.converged
    found, wanted = numbers(first), numbers(expected)
    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-9, nan_ok=True)
    for key, curve in expected.curves.items():
        np.testing.assert_allclose(first.curves[key].y, curve.y, rtol=1e-5, atol=1e-9)


def numbers(result: Result) -> dict[str, float]:
    """Every number with its errors."""
    found = {}
    for key, metric in result.metrics.items():
        found[key] = metric.value
        found |= {f"{key} ± {source}": error for source, error in metric.errors.items()}
    return found
