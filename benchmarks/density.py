"""The spectral density by Lanczos quadrature, here and in other libraries.

With as many probes and steps the statistical error of the same rule is the same for all; what is
left to compare is the price, and whether the largest node is the largest eigenvalue once (Lanczos
without reorthogonalisation repeats it: "ghosts"). Eigenpairs that are found first, as the probe
does, leave the probes less to err about: the error of the trace, by Hutchinson's formula from each
library's own nodes and weights, says by how much.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import setting
from benchmarks.timing import timed
from lsa.maths.spectra import eigenpairs
from lsa.maths.spectra.quadrature import Quadrature, spectral_density

PROBES, STEPS = 10, 80
PAIRS = 3  # found first, as the probe does by default
CLOSE = 1e-3  # of the largest node: nodes as close as this are one eigenvalue
Method = Callable[[nn.Module, Tensor, Tensor], Quadrature]


def lsa(model: nn.Module, x: Tensor, y: Tensor, pairs: int = 0) -> Quadrature:
    at, theta = setting.landscape(model, x, y)
    hessian, rng, known = at.hessian(theta), torch.Generator().manual_seed(0), None
    if pairs:
        found = eigenpairs.top(hessian, pairs, theta, rng=rng, near=at.gradient(theta)).largest
        known = found.values, found.vectors
    return spectral_density(
        hessian,
        len(theta),
        rng=rng,
        probes=PROBES,
        steps=STEPS,
        known=known,
        device=x.device,
    )


def eigenthings(model: nn.Module, x: Tensor, y: Tensor) -> Quadrature:
    from hessian_eigenthings import HessianOperator, supervised_loss
    from hessian_eigenthings.algorithms.spectral_density import spectral_density as rival

    loader = list(zip(x.split(256), y.split(256), strict=True))
    operator = HessianOperator(model, loader, supervised_loss(nn.CrossEntropyLoss()))
    found = rival(operator, num_runs=PROBES, lanczos_steps=STEPS, seed=0)
    return _rules(model, found.raw_eigenvalues, found.raw_weights)


def curvlinops(model: nn.Module, x: Tensor, y: Tensor) -> Quadrature:
    from curvlinops import HessianLinearOperator
    from curvlinops.papyan2020traces.spectrum import fast_lanczos

    operator = HessianLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)], check_deterministic=False
    )
    torch.manual_seed(0)
    found = [fast_lanczos(operator, STEPS) for _ in range(PROBES)]
    nodes, vectors = (torch.stack(parts) for parts in zip(*found, strict=True))
    return _rules(model, nodes, vectors[:, 0].square())


def _rules(model: nn.Module, nodes: Tensor, weights: Tensor) -> Quadrature:
    d = sum(p.numel() for p in model.parameters())
    return Quadrature(d, nodes.double().cpu(), weights.double().cpu(), PROBES * STEPS)


METHODS: dict[str, Method] = {
    "lsa": lsa,
    "lsa, eigenpairs first": lambda *at: lsa(*at, pairs=PAIRS),
    "curvlinops": curvlinops,
    "eigenthings": eigenthings,
}


def rows(model: nn.Module, x: Tensor, y: Tensor, rivals: list[str]) -> list[dict[str, Any]]:
    """Per library: seconds, the trace and its error, the largest node and how often it is there."""
    found = []
    for name, method in METHODS.items():
        if not name.startswith("lsa") and name not in rivals:
            continue
        rule, seconds = timed(lambda method=method: method(model, x, y))
        largest = rule.nodes.amax(1, keepdim=True)
        copies = (rule.nodes > (1 - CLOSE) * largest).sum(1)
        found.append(
            {
                "library": name,
                "seconds": seconds,
                "trace": rule.trace.value,
                "its error": rule.trace.error,
                "largest node": float(largest.max()),
                "copies of it": int(copies.max()),
            }
        )
    return found
