"""Small tensors and networks of the tests of further losses, objectives and refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tiny import N, rng, seeded
from torch import Tensor, nn

X = torch.randn(N, 4, generator=rng()).double()
Y = torch.arange(N) % 3
REAL = torch.randn(N, 3, generator=rng(5)).double()
IDS = torch.randint(1, 9, (N, 6), generator=rng(2))
FLAGS = torch.arange(6)[None] < 2 + torch.arange(N)[:, None] % 5  # of ragged length
Loss = Callable[[Any, Any], Tensor]
ADVANTAGES = torch.randn(N, generator=rng(7)).double()
SHORT = IDS * FLAGS


class Plain(NamedTuple):
    """Tensors and a loss; the truth is the loss of all samples together."""

    model: nn.Module
    x: Any
    y: Any
    loss: Loss


def mlp(outputs: int = 3, inputs: int = 4) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, outputs)))


def each(outputs: Tensor, y: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(outputs, y, reduction="none", **options)


def chosen(outputs: Tensor, y: Tensor) -> Tensor:
    """log p of the labels, along the last dimension."""
    return outputs.log_softmax(-1).gather(-1, y[..., None]).squeeze(-1)


def words() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)))


class Smoothed(nn.Module):
    """Words to words, by attention of torch, with its outputs as cross entropy takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
        self.body = nn.Transformer(4, 2, 1, 1, 8, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1]).double()
        states = self.body(self.words(source), self.words(target), tgt_mask=mask)
        return self.head(states).transpose(1, 2)
