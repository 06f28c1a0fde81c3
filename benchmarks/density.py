"""The spectral density by Lanczos quadrature, here and in other libraries.

With as many probes and steps the statistical error is the same for all; what is left to compare
is the price, and whether the largest node is the largest eigenvalue once (Lanczos without
reorthogonalisation repeats it: "ghosts").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import setting
from benchmarks.timing import timed
from lsa.maths.quadrature import spectral_density

PROBES, STEPS = 1, 80
CLOSE = 1e-3  # of the largest node: nodes as close as this are one eigenvalue


def lsa(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    at, theta = setting.landscape(model, x, y)
    rng = torch.Generator().manual_seed(0)
    return spectral_density(
        at.hessian(theta),
        len(theta),
        rng=rng,
        probes=PROBES,
        steps=STEPS,
        device=x.device,
    ).nodes


def eigenthings(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    from hessian_eigenthings import HessianOperator, supervised_loss
    from hessian_eigenthings.algorithms.spectral_density import spectral_density as rival

    loader = list(zip(x.split(256), y.split(256), strict=True))
    operator = HessianOperator(model, loader, supervised_loss(nn.CrossEntropyLoss()))
    return rival(operator, num_runs=PROBES, lanczos_steps=STEPS, seed=0).raw_eigenvalues


def curvlinops(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    from curvlinops import HessianLinearOperator
    from curvlinops.papyan2020traces.spectrum import fast_lanczos

    operator = HessianLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)], check_deterministic=False
    )
    torch.manual_seed(0)
    return torch.stack([fast_lanczos(operator, STEPS)[0] for _ in range(PROBES)])


METHODS = {"lsa": lsa, "curvlinops": curvlinops, "eigenthings": eigenthings}


def rows(model: nn.Module, x: Tensor, y: Tensor, rivals: list[str]) -> list[dict[str, Any]]:
    """Per library: seconds, the largest node and how often it stands there."""
    found = []
    for name, method in METHODS.items():
        if name != "lsa" and name not in rivals:
            continue
        nodes, seconds = timed(lambda method=method: method(model, x, y))
        largest = nodes.double().amax(1, keepdim=True)
        copies = (nodes.double() > (1 - CLOSE) * largest).sum(1)
        found.append(
            {
                "library": name,
                "seconds": seconds,
                "largest node": float(largest.max()),
                "copies of it": int(copies.max()),
            }
        )
    return found
