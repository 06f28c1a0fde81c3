"""The line between two checkpoints against as many bare forward passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks import setting
from benchmarks.timing import alternate
from lsa.probes.interpolation import interpolation

POINTS = 41
ROUNDS = 3


def rows(model: nn.Module, x: Tensor, y: Tensor) -> list[dict[str, Any]]:
    """Seconds of the probe and of the passes alone, over both splits."""
    half = len(x) // 2
    at, theta = setting.landscape(model, x[:half], y[:half])
    validation = at.with_data(x[half:], y[half:])
    away = torch.randn(len(theta), generator=torch.Generator().manual_seed(0)).to(theta)
    theta_b = theta + 0.01 * away
    weights = [
        at.unflatten(theta + a * (theta_b - theta)) for a in torch.linspace(-0.5, 1.5, POINTS)
    ]

    def probe() -> Any:
        rng = torch.Generator().manual_seed(0)
        quiet = lambda *_: None  # noqa: E731
        return interpolation(
            at, validation, theta, theta_b, rng, quiet, points=POINTS, align="none"
        )

    @torch.no_grad()
    def bare() -> None:
        for point in weights:
            for part in x.split(at.chunk):
                functional_call(model, point, (part,))

    seconds = alternate({"lsa interpolation": probe, "bare forward passes": bare}, ROUNDS)
    return [
        {"what": name, "seconds": s, "ratio": s / seconds["bare forward passes"]}
        for name, s in seconds.items()
    ]
