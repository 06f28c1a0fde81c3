"""Means over probe vectors and their errors."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from torch import Tensor

from lsa.maths.spectra.trace import mean, rademacher


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def test_a_mean_has_the_standard_error_of_its_values() -> None:
    x = normal(7)
    found = mean(x)
    assert found.samples == 7
    assert found.value == pytest.approx(float(x.mean()))
    assert found.error == pytest.approx(scipy.stats.sem(x.numpy()))
    assert math.isnan(mean(x[:1]).error)


def test_rademacher_is_signs_of_mean_zero() -> None:
    v = rademacher(10_000, generator(), torch.float32, "cpu")
    assert v.dtype == torch.float32
    assert set(v.tolist()) == {-1.0, 1.0}
    assert abs(float(v.mean())) < 4 / math.sqrt(10_000)
