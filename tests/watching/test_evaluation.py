"""Networks that are no fixed function in evaluation mode, and the precision they compute in."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lsa
from benchmarks import gpt
from lsa.watching.evaluation import seen_in
from lsa.watching.probe_set import ProbeSet
from lsa.watching.weights import Weights


class Random(nn.Module):
    """Dropout that stays on, with the random numbers of some library."""

    def __init__(self, source: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.source = nn.Linear(5, 32), nn.Linear(32, 3), source

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        if self.source == "torch":
            return self.b(F.dropout(h, 0.5))
        if self.source == "numpy":
            return self.b(h * (1 + float(np.random.rand())))
        return self.b(h * (1 + random.random()))


class Counting(Random):
    """It keeps a state from pass to pass."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.b(torch.tanh(self.a(x))) * (1 + 0.1 * self.calls)


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(64, 5, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 3


def watched(model: nn.Module, lr: float, **options: Any) -> tuple[list[dict[str, float]], Any]:
    x, y = data()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    given = {"batches": (x, y), "budget": None, "track": False, "every": 1} | options
    with lsa.watch(model, optimizer, **given) as watch:
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return watch.rows, torch.get_rng_state()


@pytest.mark.parametrize("source", ["torch", "numpy", "python"])
def test_every_pass_draws_the_same_numbers(source: str, caplog: pytest.LogCaptureFixture):
    """Of so small a step the fall is the slope: without fixed draws it is their noise."""
    rows, _ = watched(Random(source), lr=1e-2, measure=["update", "sharpness"], strict=True)
    for row in rows:
        assert row["gain"] == pytest.approx(row["gain_first_order"], rel=0.05)
        assert 0 < abs(row["directional_sharpness"]) < 10
        assert abs(row["gain_first_order"]) < 0.1
    (line,) = caplog.messages
    assert "the network draws random numbers when it is evaluated" in line


def test_the_objective_draws():
    def objective(model: nn.Module, batch: Any) -> lsa.Terms:
        x, y = batch
        return lsa.objectives.supervised()(model, (x + torch.randn_like(x), y))

    rows, _ = watched(Random("none").eval(), lr=1e-2, objective=objective, measure=["update"])
    assert rows[0]["gain"] == pytest.approx(rows[0]["gain_first_order"], rel=0.1)


def test_a_network_with_a_state_is_not_measured_on_batches(caplog: pytest.LogCaptureFixture):
    rows, _ = watched(Counting("none"), lr=1e-2)
    assert "probe_loss" not in rows[-1] and "gradient_norm" in rows[-1]
    (line,) = caplog.messages
    assert "two passes over batches= give the losses" in line and "keeps a state" in line


def test_the_precision_of_a_pass():
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    x, _ = data()

    def half() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    assert seen_in(model, lambda: model(x)) == (None, False, False)
    assert seen_in(model, half) == (torch.bfloat16, False, False)
    assert seen_in(model, lambda: torch.rand(2)) == (None, True, False)
    model[1].half()
    assert seen_in(model, lambda: None).half == torch.float16
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    "bent",
    [F.relu, F.leaky_relu, F.selu, torch.abs, lambda x: x.clamp(min=0), lambda x: x.max(1)[0]],
)
def test_kinks_are_seen_also_in_functions(bent: Any):
    model, x = nn.Linear(5, 4), torch.randn(3, 5)
    assert seen_in(model, lambda: bent(model(x))).kinks
    with torch.no_grad():
        assert seen_in(model, lambda: F.max_pool2d(model(x)[None], 2)).kinks


def test_what_lsa_counts_of_an_objective_is_no_kink():
    model, ids = gpt.build(gpt.Shape(1, 8, 2, 6, 16)), torch.randint(16, (2, 7))
    weights = Weights(model, [torch.optim.SGD(model.parameters(), lr=0.1)])
    given = {"objective": lsa.objectives.per_token(shift=False)}
    probe_set = ProbeSet(model, weights, [(ids[:, :-1], ids[:, 1:])], **given)
    probe_set.ready()
    assert not probe_set.kinks


def test_smooth_networks_have_no_kinks():
    shape = gpt.Shape(1, 8, 2, 6, 16)
    model, ids = gpt.build(shape), torch.randint(16, (2, 7))
    assert not seen_in(model, lambda: gpt.mean_loss(model, ids)).kinks
    x, whole = torch.randn(3, 5), torch.randint(9, (3, 4))
    for smooth in (F.elu, F.gelu, F.silu, F.softplus, lambda x: F.smooth_l1_loss(x, x + 1)):
        assert not seen_in(model, lambda smooth=smooth: smooth(x)).kinks
    assert not seen_in(model, lambda: whole.clamp(max=3).max()).kinks
