"""Quotients of means."""

from __future__ import annotations

import math

import torch
from scipy.special import stdtrit
from torch import Tensor


def fieller(over: Tensor, under: Tensor, level: float = 0.95) -> tuple[float, float] | None:
    """Confidence interval for E[over]/E[under] (Fieller 1954, with quantiles of Student's t).

    It holds the quotients R for which a t test does not tell the mean of over − R under from zero.

    Args:
        over: Numerators `(n,)`, n ≥ 2.
        under: Denominators `(n,)` of the same samples.
        level: Of confidence.

    Returns:
        Both ends; None where these R form no interval: the mean of `under` is not positive, or not
        told from zero.
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
