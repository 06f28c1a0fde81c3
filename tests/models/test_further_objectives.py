"""More objectives of today's tasks: each right to a dense oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from dense import agree
from tiny import N, rng, seeded
from torch import Tensor, nn

import lsa
from lsa.landscape import Landscape
from lsa.probe import find
from models.small import IDS, X, Y, each, mlp, words

pytestmark = [
    pytest.mark.usefixtures("global_rng_untouched"),
    pytest.mark.filterwarnings("ignore"),
]
CUTS = ((0, 5), (5, N))


class Packed(nn.Module):
    """Several texts in one row; a position of 0 begins the next."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(9, 4), nn.Embedding(6, 4)
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 9)

    def forward(self, ids: Tensor, places: Tensor) -> Tensor:
        text = (places == 0).cumsum(1)
        T = ids.shape[1]
        mask = (text[:, :, None] == text[:, None]) & torch.ones(T, T).tril().bool()
        q, k, v = self.qkv(self.words(ids) + self.places(places)).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class Graphs:
    """Graphs in one object with attributes, which is no container of tensors."""

    def __init__(self, seed: int, n: int) -> None:
        self.x = torch.randn(3 * n, 4, generator=rng(seed)).double()
        self.edges = torch.stack([torch.arange(3 * n), torch.arange(3 * n) // 3 * 3])
        self.of, self.y = torch.arange(n).repeat_interleave(3), torch.arange(n) % 3

    def to(self, device: Any) -> Graphs:
        return self


class Pooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, g: Graphs) -> Tensor:
        h = torch.tanh(self.a(g.x))
        h = h + torch.zeros_like(h).index_add_(0, g.edges[1], h[g.edges[0]])
        return self.b(torch.zeros(len(g.y), 5).to(h).index_add_(0, g.of, h))


Sums = Callable[..., tuple[Tensor, Tensor]]  # (network, *batch) ↦ sums and weights of samples


class Task(NamedTuple):
    """Batches, and sums and weights of each sample; with draws by torch's random numbers."""

    model: nn.Module
    batches: list[tuple]
    sums: Sums
    draws: int = 0


def cut(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [tuple(t[i:j] for t in tensors) for i, j in CUTS]


def packed() -> Task:
    places = torch.stack([torch.cat([torch.arange(k), torch.arange(6 - k)]) for k in range(1, 6)])
    places = places[torch.arange(N) % 5]
    labels = IDS.masked_fill(places == 0, -100)

    def sums(f: Any, ids: Tensor, places: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        scores = f(ids, places)[:, :-1].transpose(1, 2)
        return each(scores, labels[:, 1:]).sum(1), (labels[:, 1:] != -100).sum(1)

    return Task(seeded(Packed), cut(IDS, places, labels), sums)


def graph_objects() -> Task:
    def sums(f: Any, g: Graphs) -> tuple[Tensor, Tensor]:
        return each(f(g), g.y), torch.ones(len(g.y))

    return Task(seeded(Pooling), [(Graphs(1, 3),), (Graphs(2, 4),)], sums)


def masked_words() -> Task:
    """Words hidden at random: each draw has other words, and another number of them."""

    def sums(f: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.rand(ids.shape) < 0.3
        losses = each(f(ids.masked_fill(hidden, 0)).transpose(1, 2), ids)
        return (losses * hidden).sum(1), hidden.sum(1)

    return Task(words(), cut(IDS), sums, draws=3)


def penalised_critic() -> Task:
    """WGAN-GP (Gulrajani et al. 2017): slopes at random points between two samples."""

    def sums(f: Any, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        share = torch.rand(len(x), 1).double()
        between = (share * x + (1 - share) * z).requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(f(between).sum(), between, create_graph=True)
        losses = (f(z) - f(x))[:, 0] + 10 * (slope.norm(dim=1) - 1).square()
        return losses, torch.ones(len(x))

    return Task(mlp(1), cut(X, X.flip(0)), sums, draws=2)


def scores() -> Task:
    """Score matching (Hyvärinen 2005), by second derivatives along the inputs."""

    def sums(f: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        with torch.enable_grad():
            (s,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
            columns = [torch.autograd.grad(c.sum(), x, create_graph=True)[0] for c in s.T]
        trace = torch.stack([c[:, i] for i, c in enumerate(columns)]).sum(0)
        return trace + s.square().sum(1) / 2, torch.ones(len(x))

    return Task(mlp(1), cut(X), sums)


@pytest.mark.parametrize(
    "make",
    [packed, graph_objects, masked_words, penalised_critic, scores],
    ids=lambda f: f.__name__,
)
def test_an_objective_is_right(make):
    model, batches, sums, draws = make()

    def objective(network: nn.Module, batch: Any) -> lsa.Terms:
        parts = sums(network, *(batch if isinstance(batch, tuple) else (batch,)))
        return lsa.Terms(parts[0].sum(), parts[1].sum(), *parts)

    def parts(f: Any) -> tuple[Tensor, Tensor]:
        """Sums and weights of all samples; means over the draws."""
        found = []
        for i, batch in enumerate(batches):
            with torch.random.fork_rng([]):
                drawn = [
                    sums(f, *batch) for d in range(max(draws, 1))
                    if torch.manual_seed(draws * i + d)
                ]  # fmt: skip
            found.append([torch.stack(p).double().mean(0) for p in zip(*drawn, strict=True)])
        return tuple(torch.cat(p) for p in zip(*found, strict=True))

    def whole(f: Any) -> Tensor:
        totals, weights = parts(f)
        return totals.sum() / weights.sum()

    def samples(f: Any) -> Tensor:
        totals, weights = parts(f)
        return len(totals) * totals / weights.sum()

    given = [batch[0] if isinstance(batch[0], Graphs) else batch for batch in batches]
    landscape = Landscape(model, given, objective=objective, draws=draws)
    agree(landscape, landscape.theta, whole, samples)
    result = find("lanczos")(landscape=landscape, theta=landscape.theta, k=1, density_probes=0)
    assert result.converged
    assert not any("depends on the others" in note for note in result.notes)


def test_with_draws_samples_that_a_layer_mixes_are_told_from_random_numbers():
    class Mixup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(0.6 * x + 0.4 * x[torch.randperm(len(x))])

    landscape = Landscape(Mixup(), cut(X, Y), draws=4)
    notes = find("lanczos")(landscape=landscape, theta=landscape.theta, k=1).notes
    assert any("depends on the others of its batch" in note for note in notes)
