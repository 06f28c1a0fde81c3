"""What a network is left with after a pass, and how one that fails is told."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tiny import rng, seeded
from torch import Tensor, nn

import lsa

X = torch.randn(10, 4, generator=rng()).double()
Y = torch.arange(10) % 3


class Statistics(nn.Module):
    """Batch norm by the samples in hand always, which writes the means that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("variance", torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        h = F.batch_norm(self.first(x), self.mean, self.variance, training=True)  # pyright: ignore
        return self.last(h)


def test_statistics_that_a_function_writes_are_put_back():
    model = seeded(Statistics)
    landscape = lsa.Landscape(model, [(X, Y)], copy=False)
    theta = landscape.theta
    landscape.gradient(theta)
    landscape.hessian(theta)(theta)
    assert not model.mean.any() and bool((model.variance == 1).all())
    notes = lsa.lanczos(landscape, k=1, density_probes=0).notes
    assert any("changes its buffer 'mean'" in note for note in notes)
    assert not model.mean.any()
