"""The largest value of a quadratic on a sphere, from its eigendecomposition."""

from __future__ import annotations

import torch
from scipy.optimize import brentq
from torch import Tensor


def highest(H: Tensor, g: Tensor, radius: float) -> float:
    """Maximum of gᵀx + xᵀHx/2 on |x| = radius, for g with a part along the top eigenvector.

    There x = (μI − H)⁻¹g, and μ > λ_max is the root of the secular equation |x| = radius.
    """
    values, vectors = torch.linalg.eigh(H)
    c = vectors.T @ g

    def excess(mu: float) -> float:
        return float((c / (mu - values)).norm()) - radius

    top = float(values[-1])
    mu = brentq(excess, top + 1e-12, top + float(c.norm()) / radius + 1.0)
    x = vectors @ (c / (mu - values))
    return float(g @ x + x @ H @ x / 2)
