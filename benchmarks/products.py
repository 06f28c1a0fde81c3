"""One product with each matrix, and the curvatures of all samples, against one gradient."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks import setting
from benchmarks.timing import alternate

ROUNDS = 7
KEPT = 16 << 30  # bytes: every graph fits


def rows(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[dict[str, object]]:
    """Per matrix and per memory: seconds, and the ratio to a gradient."""
    at, theta = setting.landscape(model, x, y)
    v = torch.randn(len(theta), generator=torch.Generator().manual_seed(0)).to(theta)
    tasks = {"gradient": lambda: at.gradient(theta)}
    for label, memory in (("graphs kept", KEPT), ("nothing kept", 0)):
        chosen, _ = setting.landscape(model, x, y, memory=memory)
        for name in ("hessian", "gauss_newton", "covariance"):
            product = getattr(chosen, name)(theta)
            product(v)  # builds what is kept
            tasks[f"{name}, {label}"] = lambda product=product: product(v)
    tasks["curvatures of the samples"] = lambda: at.curvatures(theta, v)
    seconds = alternate(tasks, ROUNDS)
    return [
        {"product": name, "seconds": s, "gradients": s / seconds["gradient"]}
        for name, s in seconds.items()
    ]
