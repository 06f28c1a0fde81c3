"""Tiny networks in float64 and the data that they are tried on."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

N, T = 14, 5


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double()


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


class PerPosition(nn.Module):
    """Scores `(n, classes, positions)`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x))).transpose(1, 2)


def cut(x: Any, y: Any, *ends: int) -> list[tuple[Any, Any]]:
    """Batches of unequal size."""
    return [(x[i:j], y[i:j]) for i, j in itertools.pairwise([0, *ends, len(x)])]


class Merging(nn.Linear):
    """Like layers of LoRA: the weight holds the adapter's part while `eval()` is on."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.weight.requires_grad_(False)
        self.a = nn.Parameter(0.1 * torch.randn(2, inputs))
        self.b = nn.Parameter(0.1 * torch.randn(outputs, 2))
        self.merged = False

    def train(self, mode: bool = True) -> Merging:
        """Merge, or take the part out again."""
        super().train(mode)
        if self.merged == mode:
            self.weight.data += (-1 if mode else 1) * self.b @ self.a
            self.merged = not mode
        return self

    def forward(self, input: Tensor) -> Tensor:
        """The layer, and the adapter where it is not merged."""
        return super().forward(input) + (0 if self.merged else input @ self.a.T @ self.b.T)


def images() -> tuple[nn.Module, Tensor, Tensor]:
    """Samples in class order, as a folder has them."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    return model, torch.randn(N, 4, generator=rng()).double(), torch.arange(N) * 3 // N


def ragged() -> tuple[nn.Module, Tensor, Tensor]:
    """Sequences sorted by length; the last is wholly ignored."""
    y = torch.randint(3, (N, T), generator=rng(1))
    for i in range(N):
        y[i, 1 + i * T // (N - 1) :] = -100
    y = y.flip(0)
    y[-1] = -100
    return seeded(PerPosition), torch.randn(N, T, 4, generator=rng()).double(), y
