"""Means over probe vectors and their intervals."""

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


def test_interval_is_student_t() -> None:
    x = normal(7)
    low, high = mean(x).interval(0.9)
    expected = scipy.stats.t.interval(0.9, 6, float(x.mean()), float(x.std()) / math.sqrt(7))
    assert (low, high) == pytest.approx(expected)
    assert mean(x[:1]).interval() == (-math.inf, math.inf)


def test_rademacher_is_signs_of_mean_zero() -> None:
    v = rademacher(10_000, generator(), torch.float32, "cpu")
    assert v.dtype == torch.float32
    assert set(v.tolist()) == {-1.0, 1.0}
    assert abs(float(v.mean())) < 4 / math.sqrt(10_000)
