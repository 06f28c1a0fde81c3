"""Data, networks in float32 and what is said of them, for the tests of wrong numbers."""

from __future__ import annotations

from typing import Any

import torch
from tiny import rng
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lsa
from lsa.landscape import consistency

X, Y = torch.randn(24, 4, generator=rng(1)), torch.arange(24) % 3


def seeded(build: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build()


def mlp(outputs: int = 3) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)))


def loader(y: Tensor = Y, **options: Any) -> DataLoader:
    return DataLoader(TensorDataset(X, y), **{"batch_size": 8, **options})


def notes(landscape: lsa.Landscape) -> str:
    return "; ".join(consistency.notes(landscape, landscape.theta))


def dense(model: nn.Module, value: Any) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian in float64; `value` takes the network's parameters by name."""
    named = {n: p.detach().double() for n, p in model.named_parameters() if p.requires_grad}
    sizes = [p.numel() for p in named.values()]

    def of(flat: Tensor) -> Tensor:
        parts = zip(named.items(), flat.split(sizes), strict=True)
        return value({name: part.view_as(p) for (name, p), part in parts})

    at = torch.cat([p.reshape(-1) for p in named.values()])
    derivatives: Any = torch.autograd.functional
    return derivatives.jacobian(of, at), derivatives.hessian(of, at)
