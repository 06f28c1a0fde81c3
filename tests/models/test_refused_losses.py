"""Losses that no landscape is made of: each is refused in one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import rng, seeded
from torch import Tensor, nn

import lsa
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


class Straight(nn.Module):
    """Networks whose gradient is not that of their loss."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b, self.kind = nn.Linear(4, 5), nn.Linear(5, 3), kind
        self.codes = nn.Parameter(torch.randn(6, 5, generator=rng(4)))

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        if self.kind == "codes":
            nearest = self.codes[torch.cdist(z, self.codes).argmin(1)]
            z = z + (nearest - z).detach()
        elif self.kind == "gumbel":
            z = F.gumbel_softmax(z, hard=True)
        elif self.kind == "equilibrium":  # one step with a gradient from a fixed point without
            with torch.no_grad():
                h = z
                for _ in range(30):
                    h = torch.tanh(h @ self.codes[:5] / 8 + z)
            z = torch.tanh(h @ self.codes[:5] / 8 + z)
        return self.b(z)


class Balanced(nn.Module):
    """Experts, and the loss of their balance: one number for all samples of a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 3), nn.Linear(4, 9)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.gate(x).softmax(1)
        mixed = (self.experts(x).view(len(x), 3, 3) * p[..., None]).sum(1)
        return mixed, p.mean(0).square().sum()


def covariances(o: Tensor, y: Tensor) -> Tensor:
    """VICReg's terms of a batch (Bardes et al. 2022)."""
    centred = o - o.mean(0)
    C = centred.T @ centred / max(1, len(o) - 1)
    return F.relu(1 - (C.diagonal() + 1e-4).sqrt()).mean() + (C - C.diag().diag()).square().sum()


def hardest(o: Tensor, y: Tensor) -> Tensor:
    apart, same = torch.cdist(o, o), y[:, None] == y[None]
    return F.relu((apart * same).amax(1) - (apart + 1e3 * same).amin(1) + 1).mean()


def hazards(o: Tensor, y: Any) -> Tensor:
    """Cox's partial likelihood."""
    times, seen = y
    h = o[times.argsort(descending=True), 0]
    return -((h - h.logcumsumexp(0)) * seen[times.argsort(descending=True)]).sum() / len(h)


def normalised(o: Tensor, y: Any) -> Tensor:
    actions, advantages = y
    scaled = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
    return -(chosen(o, actions) * scaled).mean()


def by_variance(o: Tensor, y: Tensor) -> Tensor:
    """β-NLL (Seitzer et al. 2022), whose weights are detached."""
    v = F.softplus(o[:, 1]) + 0.1
    return (((y - o[:, 0]).square() / v + v.log()) * v.detach().sqrt()).mean()


def known(o: Tensor, y: Tensor) -> Tensor:
    there = ~y.isnan()
    return ((o - y.nan_to_num())[there] ** 2).mean()


def refusals() -> dict[str, tuple[Plain, str]]:
    missing = REAL.clone()
    missing[::3, 0] = missing[1::2, 2] = float("nan")
    smoothed = {"ignore_index": 0, "label_smoothing": 0.1}
    ordered = ADVANTAGES.sort().values
    gradient, mean = "gradient is not that of the loss", "no mean over"

    def inside(o: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(o, y, **smoothed)

    def tokens(o: Tensor, y: Any) -> Tensor:
        return -(chosen(o, y[0]) * y[1] * y[2][:, None]).sum() / y[1].sum()

    def by_counts(o: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(o, y, 1 / torch.bincount(y, minlength=3).clamp_min(1).double())

    def flipped(o: Tensor, y: Tensor) -> Tensor:
        return 0.6 * F.cross_entropy(o, y) + 0.4 * F.cross_entropy(o, y.flip(0))

    def balanced(o: Any, y: Tensor) -> Tensor:
        return F.cross_entropy(o[0], y) + 0.1 * o[1]

    seq2seq = seeded(Smoothed)
    return {
        "smoothing and ignore_index inside of a function": (
            Plain(seq2seq, (IDS, SHORT[:, :-1]), SHORT[:, 1:], inside), mean
        ),
        "advantages normalised in the loss": (Plain(mlp(), X, (Y, ordered), normalised), mean),
        "a mean over tokens (DAPO)": (Plain(words(), IDS, (IDS, FLAGS, ADVANTAGES), tokens), mean),
        "weights by the counts of a batch": (Plain(mlp(), X, Y.sort().values, by_counts), mean),
        "mixup of targets in the loss": (Plain(mlp(), X, Y.sort().values, flipped), mean),
        "targets that are not known": (Plain(mlp(), X, missing, known), mean),
        "hardest pairs of a batch": (Plain(mlp(), X, Y, hardest), mean),
        "covariances of a batch": (Plain(mlp(), X, Y, covariances), mean),
        "hazards": (Plain(mlp(1), X, (REAL[:, 0].abs(), REAL[:, 1] > -0.5), hazards), mean),
        "a balance of experts as an output": (Plain(seeded(Balanced), X, Y, balanced), mean),
        "detached weights": (Plain(mlp(2), X, REAL[:, 0], by_variance), gradient),
        "nearest codes": (
            Plain(seeded(lambda: Straight("codes")), X, Y, F.cross_entropy), gradient
        ),
        "hard choices at random": (
            Plain(seeded(lambda: Straight("gumbel")), X, Y, F.cross_entropy), gradient
        ),
        "an equilibrium by its last step": (
            Plain(seeded(lambda: Straight("equilibrium")), X, Y, F.cross_entropy), "is not"
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", refusals())
def test_what_is_no_landscape_is_refused_in_one_line(name):
    (model, x, y, loss), line = refusals()[name]
    with pytest.raises(lsa.InputError, match=line) as caught:
        landscape = Landscape(model, x, y, loss, chunk=4)
        find("lanczos")(landscape=landscape, theta=landscape.theta, k=1, density_probes=0)
    assert "\n" not in str(caught.value)
