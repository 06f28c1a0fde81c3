"""The training's own loss: which of the numbers that are seen it is, and when none of them is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lsa

X, Y = torch.randn(24, 5, generator=torch.Generator().manual_seed(1)), torch.arange(24) % 3
criterion = nn.CrossEntropyLoss()


class WithLoss(nn.Module):
    """Its outputs have the loss, as in Hugging Face."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Linear(5, 3)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.map(x), y)}


def decayed(model: nn.Module, value: Tensor) -> Tensor:
    return value + 0.5 * sum(p.square().sum() for p in model.parameters())


def told(model: Any, watch: Any, optimizer: Any) -> Tensor:
    """The loop tells the whole loss, of which the outputs have a part."""
    total = decayed(model, model(X, Y)["loss"])
    watch.loss(total)
    total.backward()
    optimizer.step()
    return total.detach()


def told_by_numpy(model: Any, watch: Any, optimizer: Any) -> float:
    model(X, Y)["loss"].backward()
    watch.loss(np.float32(2.5))
    optimizer.step()
    return 2.5


def returned(model: Any, _watch: Any, optimizer: Any) -> Tensor:
    """A closure's loss, of which the outputs have a part."""
    values: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        values.append(decayed(model, model(X, Y)["loss"]))
        values[-1].backward()
        return values[-1]

    optimizer.step(closure)
    return values[0].detach()


def accumulated(model: Any, _watch: Any, optimizer: Any) -> Tensor:
    """Two passes, one of the loss each."""
    losses = [model(X[i::2], Y[i::2])["loss"] for i in range(2)]
    for value in losses:
        (value / 2).backward()
    optimizer.step()
    return (losses[0] + losses[1]).detach() / 2


def validated(model: Any, _watch: Any, optimizer: Any) -> None:
    """A pass that nothing is learned from: which one counts is not known."""
    model(3 * X, Y.roll(1))
    model(X, Y)["loss"].backward()
    optimizer.step()


@pytest.mark.parametrize("way", [told, told_by_numpy, returned, accumulated, validated])
def test_outputs_with_a_loss(way: Callable[..., Any]):
    """Also in the step after one, whose losses are no part of it."""
    model = WithLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lsa.watch(model, optimizer, budget=None, track=False, strict=True) as watch:
        for _ in range(2):
            optimizer.zero_grad()
            wanted = way(model, watch, optimizer)
    if wanted is None:
        assert "loss" not in watch.rows[-1]
    else:
        assert watch.rows[-1]["loss"] == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("outputs", [True, False])
def test_a_closure_that_is_called_again_has_the_first_loss(outputs: bool):
    model = WithLoss()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=8)
    first: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = model(X, Y)["loss"] if outputs else criterion(model.map(X), Y)
        value.backward()
        first.append(value.item())
        return value

    loss = None if outputs else criterion
    with lsa.watch(model, optimizer, loss=loss, budget=None, track=False, strict=True) as watch:
        optimizer.step(closure)
    assert watch.rows[0]["loss"] == pytest.approx(first[0])
    assert first[-1] < 0.99 * first[0]


@pytest.mark.parametrize(("terms", "seen"), [(1, True), (2, False)])
def test_a_loss_module_that_is_one_of_several_terms_is_not_the_loss(terms: int, seen: bool):
    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lsa.watch(model, optimizer, loss=criterion, budget=None, track=False) as watch:
        values = [criterion(model(X), Y.roll(i)) for i in range(terms)]
        torch.stack(values).sum().backward()
        optimizer.step()
    assert watch.rows[0].get("loss") == (pytest.approx(values[0].item()) if seen else None)


@pytest.mark.parametrize("calls", [1, 2])
def test_where_passes_are_not_counted_one_call_is_the_loss(calls: int):
    """In step 2 norms are measured for the sake of what is measured on batches."""
    model = WithLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {"batches": [(X, Y)], "measure": ["noise"], "every": 2, "norms": 5}

    def objective(model: Any, batch: Any) -> lsa.Terms:
        return lsa.objectives.supervised()(model.map, batch)

    options |= {"objective": objective, "budget": None, "track": False}
    with lsa.watch(model, optimizer, **options) as watch:
        for _ in range(2):
            optimizer.zero_grad()
            values = [model(X, Y.roll(i))["loss"] for i in range(calls)]
            torch.stack(values).sum().backward()
            optimizer.step()
    assert watch.rows[1].get("loss") == (pytest.approx(values[0].item()) if calls == 1 else None)


def test_what_is_no_number_is_no_loss():
    model = WithLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lsa.watch(model, optimizer, track=False, budget=None) as watch:
        model(X, Y)["loss"].backward()
        watch.loss(np.ones(2))
        optimizer.step(lambda: np.ones(2))
    assert len(watch.rows) == 1 and watch.rows[0]["gradient_norm"] > 0
