"""Quotients of means."""

from __future__ import annotations

import math

import torch
from scipy.special import stdtrit
from torch import Tensor


def fieller(over: Tensor, under: Tensor, level: float = 0.95) -> tuple[float, float] | None:
    """Interval for E[over]/E[under] from pairs `(n,)` each, n ≥ 2 (Fieller 1954, t-quantiles).

    The quotients R for which the mean of over − R under is not told from zero. None where they
    are no interval, as the mean of `under` is not told from zero, or is below it.
    """
    n = len(over)
    t = float(stdtrit(n - 1, 0.5 + level / 2))
    (vo, vou), (_, vu) = (torch.cov(torch.stack([over, under]).double()) * (t * t / n)).tolist()
    a, b = float(over.double().mean()), float(under.double().mean())
    square = b * b - vu
    if not (b > 0 and square > 0):
        return None
    middle = a * b - vou
    half = math.sqrt(max(0.0, middle * middle - square * (a * a - vo)))
    return (middle - half) / square, (middle + half) / square
