"""Means over random probe vectors, with their standard errors."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Estimate(NamedTuple):
    """A mean over random probe vectors, with its standard error."""

    value: float
    error: float  # standard error over the probes; nan for a single probe
    samples: int  # independent probes behind the standard error


def mean(x: Tensor) -> Estimate:
    """Mean of independent values `(n,)`, its standard error sd/√n, and n."""
    n = len(x)
    return Estimate(float(x.mean()), float(x.std()) / math.sqrt(n) if n > 1 else math.nan, n)


def rademacher(
    dimension: int, rng: torch.Generator, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """A vector `(d,)` of independent random signs ±1.

    Of all vectors with independent entries of mean 0 and variance 1 it gives Hutchinson's trace
    estimate the least variance (Hutchinson 1989).

    Args:
        dimension: d.
        rng: Source of the signs, which are drawn on its device.
        dtype: Of the vector.
        device: Of the vector.
    """
    bits = torch.randint(0, 2, (dimension,), generator=rng, device=rng.device)
    return (2 * bits - 1).to(dtype=dtype, device=device)
