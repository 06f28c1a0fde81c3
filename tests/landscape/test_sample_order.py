"""Networks that move their samples about inside, in ways that depend on the data."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dense import agree
from torch import Tensor, nn

import lsa

N, FIRST = 30, 8  # samples; of them, those by which a landscape chooses its way, or a batch
pytestmark = pytest.mark.usefixtures("double")


class Sorted(nn.Module):
    """Samples in groups of a kind, as a network of experts or of lengths puts them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        order = (x[:, 0] < 0).int().argsort(stable=True)
        return self.b(torch.tanh(self.a(x))[order])[order.argsort()]


class Experts(nn.Module):
    """Each sample by one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 3) for _ in range(2)])
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x[:, 0] < 0).long()
        hidden = x.new_zeros(len(x), 3)
        for k, expert in enumerate(self.experts):
            rows = (chosen == k).nonzero()[:, 0]
            if len(rows):
                hidden = hidden.index_add(0, rows, torch.tanh(expert(x[rows])))
        return self.head(hidden)


class Leaving(nn.Module):
    """Samples that are sure leave after the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, stays = self.a(x), x[:, 0] < 0
        return torch.where(stays[:, None], self.b(torch.tanh(y)), y) if stays.any() else y


def data() -> tuple[Tensor, Tensor]:
    """The first samples are of one kind, the others of both."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(N, 4, generator=rng, dtype=torch.float64)
    x[:FIRST, 0] = x[:FIRST, 0].abs()
    return x, torch.arange(N) % 3


@pytest.mark.parametrize("first", [1, FIRST, N])
@pytest.mark.parametrize("network", [Sorted, Experts, Leaving])
def test_every_number_is_that_of_its_sample(network, first):
    """Against dense derivatives; in one piece, or in batches of which the first is of one kind."""
    x, y = data()
    torch.manual_seed(0)
    model = network()
    cuts = [first, N - first]
    batches = [*zip(x.split(cuts), y.split(cuts), strict=True)]
    at = lsa.Landscape(model, x, y) if first == N else lsa.Landscape(model, batches)
    agree(
        at,
        at.theta,
        lambda net: F.cross_entropy(net(x), y),
        lambda net: F.cross_entropy(net(x), y, reduction="none"),
    )
    assert lsa.lanczos(at, k=1, density_probes=0).converged
