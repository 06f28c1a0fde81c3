"""Matrices and spectra with known eigenvalues."""

from __future__ import annotations

import math
from typing import Any

import scipy.stats
import torch
from torch import Tensor

OUTLIERS = [100.0, 60, 45, 38, 30, 25, 21, 18, 15, 12]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rotation(d: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(d, d, seed=seed)).Q


def symmetric(d: int, seed: int = 0) -> Tensor:
    A = normal(d, d, seed=seed)
    return (A + A.T) / math.sqrt(2 * d)


def hessian_like(d: int, outliers: list[float] | None = None, lowest: float = -3.0) -> Tensor:
    """A spectrum as networks have it: a few large eigenvalues, a bulk at zero, some negative."""
    bulk = 0.3 * normal(d - len(OUTLIERS if outliers is None else outliers) - 1).abs()
    bulk[: d // 60] *= -1.7
    top = torch.tensor(OUTLIERS if outliers is None else outliers, dtype=torch.float64)
    return torch.cat([top, bulk, torch.tensor([lowest], dtype=torch.float64)])


class Counting:
    """A product that counts its calls."""

    def __init__(self, A: Tensor) -> None:
        self.A, self.calls = A, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.calls += 1
        return self.A * v if self.A.ndim == 1 else self.A @ v


def interval(estimate: Any, level: float = 0.95) -> tuple[float, float]:
    """Confidence interval of an estimate, by Student's t with samples − 1 degrees of freedom."""
    low, high = scipy.stats.t.interval(level, estimate.samples - 1, estimate.value, estimate.error)
    return float(low), float(high)
