"""More losses of today's tasks, of tensors: each right to a dense oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import agree
from tiny import N, rng, seeded
from torch import Tensor, nn

from lsa.landscape import Landscape
from lsa.probe import find
from models.small import (
    ADVANTAGES,
    FLAGS,
    IDS,
    REAL,
    SHORT,
    Plain,
    Smoothed,
    X,
    Y,
    chosen,
    mlp,
    words,
)

pytestmark = [
    pytest.mark.usefixtures("global_rng_untouched"),
    pytest.mark.filterwarnings("ignore"),
]


class Twins(nn.Module):
    """Two views: the first through a trained branch, the second through one that stands still."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.head, self.target = mlp(), mlp(3, 3), mlp().requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            kept = F.normalize(self.target(b), dim=1)
        return F.normalize(self.head(self.online(a)), dim=1), kept


class Queue(nn.Module):
    """Contrastive with a queue of negatives (He et al. 2020), which a pass may write."""

    def __init__(self, writes: bool = False) -> None:
        super().__init__()
        self.query, self.key, self.writes = mlp(), mlp().requires_grad_(False), writes
        negatives = F.normalize(torch.randn(6, 3, generator=rng(3)).double(), dim=1)
        self.register_buffer("queue", negatives)

    def forward(self, x: Tensor) -> Tensor:
        q = F.normalize(self.query(x), dim=1)
        with torch.no_grad():
            k = F.normalize(self.key(x + 0.1), dim=1)
        own, others = (q * k).sum(1, keepdim=True), q @ self.queue.clone().T
        if self.writes:
            self.queue.copy_(torch.cat([k, self.queue])[:6])
        return torch.cat([own, others], 1) / 0.2


class Three(nn.Module):
    """One network for an anchor and two others."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(self.body, inputs))


class Flow(nn.Module):
    """A coupling and a linear map, with the logarithm of the determinant."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Linear(2, 4)
        self.map = nn.Parameter(torch.randn(4, 4, generator=rng(2)) + 3 * torch.eye(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.shift(x[:, :2]).split(2, 1)
        z = torch.cat([x[:, :2], x[:, 2:] * scale.tanh().exp() + shift], 1)
        volume = scale.tanh().sum(1) - torch.linalg.slogdet(self.map)[1]
        return torch.linalg.solve(self.map, z.T).T, volume


class Ode(nn.Module):
    """Two steps of Runge and Kutta."""

    def __init__(self) -> None:
        super().__init__()
        self.field, self.head = mlp(4), seeded(lambda: nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            a = self.field(x)
            b = self.field(x + a / 4)
            c = self.field(x + b / 4)
            x = x + (a + 2 * b + 2 * c + self.field(x + c / 2)) / 12
        return self.head(x)


class Chain(nn.Module):
    """Scores of tags and of their transitions, for a conditional random field."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)
        self.moves = nn.Parameter(torch.randn(3, 3, generator=rng(2)))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.words(ids)), self.moves


def chain_loss(outputs: Any, y: Any) -> Tensor:
    (scores, moves), (tags, flags) = outputs, y
    ways, own = scores[:, 0], scores[:, 0].gather(1, tags[:, :1])[:, 0]
    for t in range(1, scores.shape[1]):
        there = flags[:, t]
        after = (ways[:, :, None] + moves).logsumexp(1) + scores[:, t]
        ways = torch.where(there[:, None], after, ways)
        step = scores[:, t].gather(1, tags[:, t : t + 1])[:, 0] + moves[tags[:, t - 1], tags[:, t]]
        own = own + torch.where(there, step, 0.0)
    return (ways.logsumexp(1) - own).mean()


def ppo(outputs: Tensor, y: Any) -> Tensor:
    actions, before, advantages = y
    ratio = (chosen(outputs, actions) - before).exp()
    clipped = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    p = outputs.log_softmax(1)
    return -clipped.mean() + 0.01 * (p.exp() * p).sum(1).mean()


def pinball(outputs: Tensor, y: Tensor) -> Tensor:
    q = torch.tensor([0.1, 0.5, 0.9]).double()
    over = y[:, None] - outputs
    return torch.maximum(q * over, (q - 1) * over).mean()


def distilled(outputs: Tensor, y: Any) -> Tensor:
    teacher, labels = y
    p = (outputs / 2).log_softmax(1)
    soft = F.kl_div(p, (teacher / 2).softmax(1), reduction="batchmean")
    return 4 * soft + 0.3 * F.cross_entropy(outputs, labels)


def sequences(outputs: Tensor, y: Any) -> Tensor:
    """GRPO (Shao et al. 2024): the mean over sequences of their own means over tokens."""
    ids, flags, advantages = y
    own = chosen(outputs, ids) * flags
    return -(own.sum(1) / flags.sum(1) * advantages).mean()


BEFORE = chosen(REAL, Y)
NOTHING = torch.zeros(N)


def tasks() -> dict[str, Plain]:
    smoothed = nn.CrossEntropyLoss(
        ignore_index=0, label_smoothing=0.1, weight=torch.linspace(0.5, 2, 9).double()
    )
    return {
        "knowledge distillation": Plain(mlp(), X, (2 * REAL, Y), distilled),
        "contrastive with a queue": Plain(Queue(), X, torch.zeros(N).long(), F.cross_entropy),
        "policy gradient, clipped (PPO)": Plain(mlp(), X, (Y, BEFORE, ADVANTAGES), ppo),
        "policy gradient, sequences (GRPO)": Plain(
            words(), IDS, (IDS, FLAGS, ADVANTAGES), sequences
        ),
        "quantile regression": Plain(mlp(), X, REAL[:, 0], pinball),
        "seq2seq, smoothed, ignored, weighted": Plain(
            seeded(Smoothed), (IDS, SHORT[:, :-1]), SHORT[:, 1:], smoothed
        ),
        "two views (BYOL)": Plain(
            Twins(), (X, X + 0.1), NOTHING, lambda o, y: (2 - 2 * (o[0] * o[1]).sum(1)).mean()
        ),
        "triplets": Plain(
            Three(), (X, X + 0.2, X.flip(0)), NOTHING, lambda o, y: F.triplet_margin_loss(*o)
        ),
        "a flow": Plain(
            seeded(Flow), X, NOTHING, lambda o, y: (o[0].square().sum(1) / 2 - o[1]).mean()
        ),
        "an ordinary differential equation": Plain(Ode(), X, Y, F.cross_entropy),
        "a conditional random field": Plain(
            seeded(Chain), IDS, (IDS % 3, FLAGS), chain_loss
        ),
        "mean and variance": Plain(
            mlp(2), X, REAL[:, 0],
            lambda o, y: F.gaussian_nll_loss(o[:, 0], y, F.softplus(o[:, 1])),
        ),
        "targets that are flags": Plain(
            mlp(1), X, Y == 1,
            lambda o, y: F.binary_cross_entropy_with_logits(o[:, 0], y.double()),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", tasks())
def test_a_loss_of_tensors_is_right(name):
    model, x, y, loss = tasks()[name]
    landscape = Landscape(model, x, y, loss, chunk=4)
    inputs = x if isinstance(x, tuple) else (x,)
    dense = "seq2seq" not in name
    agree(landscape, landscape.theta, lambda f: loss(f(*inputs), y), dense=dense, rounding=1e-8)
    result = find("lanczos")(landscape=landscape, theta=landscape.theta, k=1, density_probes=0)
    assert result.converged and not any("checked" in note for note in result.notes)


def test_a_queue_that_a_pass_writes_is_put_back_and_said():
    y = torch.zeros(N).long()
    still, writing = (Landscape(Queue(w), X, y, chunk=4) for w in (False, True))
    found, expected = (
        find("lanczos")(landscape=at, theta=at.theta, k=1, density_probes=0)
        for at in (writing, still)
    )
    assert found["lambda_max"].value == pytest.approx(expected["lambda_max"].value, rel=1e-9)
    assert any("'queue', which is put back" in note for note in found.notes)


def test_outputs_of_one_column_say_no_class():
    y = torch.arange(N) % 2

    def loss(o: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(o[:, 0], y.double())

    landscape = Landscape(mlp(1), X, y, loss)
    assert math.isnan(landscape.evaluate(landscape.theta).error)
