"""The largest eigenvalue of the gradient covariance, by products and from all sample gradients."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks import setting
from benchmarks.timing import peak
from lsa.maths.spectra import eigenpairs

TOL = 1e-3
ROUNDS = 5
CHUNKS = {"cuda": 512}  # sample gradients at once; else 32, which a CPU's cache holds


def by_products(model: nn.Module, x: Tensor, y: Tensor, memory: int | None = None) -> float:
    """λ_max of C = 1/N ∑ (gᵢ − g)(gᵢ − g)ᵀ by Lanczos from near g, which comes with C."""
    at, theta = setting.landscape(model, x, y, memory=memory)
    rng = torch.Generator().manual_seed(0)
    product, g = at.covariance_and_mean(theta)
    found = eigenpairs.top(product, 1, theta, rng=rng, near=g, tol=TOL, confirm=0)
    return float(found.largest.values[0])


def by_gram(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The same from the Gram matrix of the sample gradients, which `torch.func` gives at once."""
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, weights, (x[None],)), y[None])

    parts = []
    size = CHUNKS.get(x.device.type, 32)
    for inputs, targets in zip(x.split(size), y.split(size), strict=True):
        found = vmap(grad(loss), (None, 0, 0))(weights, inputs, targets)
        parts.append(torch.cat([g.flatten(1) for g in found.values()], 1))
    G = torch.cat(parts)
    G -= G.mean(0)
    return float(torch.linalg.eigvalsh(G @ G.T / len(G))[-1])


def rows(model: nn.Module, x: Tensor, y: Tensor) -> list[dict[str, Any]]:
    """Per method: median seconds of rounds that run all in turn, most bytes, and eigenvalue."""
    methods = {
        "lsa": by_products,
        "lsa, half a gigabyte kept": partial(by_products, memory=1 << 29),
        "lsa, nothing kept": partial(by_products, memory=0),
        "sample gradients and Gram matrix": by_gram,
    }
    measured = {name: [] for name in methods}
    for _ in range(ROUNDS):
        for name, method in methods.items():
            measured[name].append(peak(partial(method, model, x, y)))
    found = []
    for name, rounds in measured.items():
        values, seconds, sizes = zip(*rounds, strict=True)
        found.append(
            {
                "method": name,
                "seconds": statistics.median(seconds),
                "MB": max(sizes) / 1e6,
                "λ_C": values[0],
            }
        )
    return found
