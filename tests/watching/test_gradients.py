"""The length of the gradient before clipping, against the length that the loop sees there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lsa

X, Y = torch.randn(60, 5, generator=torch.Generator().manual_seed(1)), torch.arange(60) % 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))


def length(model: nn.Module) -> float:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return math.sqrt(sum(float(g.double().square().sum()) for g in grads))


def watched(model: nn.Module, optimizer: Any, **options: Any) -> Any:
    return lsa.watch(model, optimizer, budget=None, track=False, every=1, strict=True, **options)


def steps(
    factor: Callable[[int], float], clips: Callable[[int], float | None], n: int = 5
) -> tuple[list[float], list[dict[str, float]]]:
    """Lengths before clipping, and rows, of a loss that is scaled by hand."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lengths = []
    options = {"measure": ["noise_of_samples"]}
    with watched(model, optimizer, **options) as watch:
        for step in range(n):
            optimizer.zero_grad()
            (factor(step) * F.cross_entropy(model(X), Y)).backward()
            for p in model.parameters():
                assert p.grad is not None
                p.grad /= factor(step)
            lengths.append(length(model))
            if (limit := clips(step)) is not None:
                nn.utils.clip_grad_norm_(model.parameters(), limit)
            optimizer.step()
    return lengths, watch.rows


@pytest.mark.parametrize("factor", [lambda _: 128.0, lambda _: 60.0, lambda i: 937.0 + i])
def test_a_loss_that_is_scaled_by_hand(factor: Callable[[int], float]):
    """As by a number of tokens: not told apart in the first step, which has no such number."""
    lengths, rows = steps(factor, lambda _: None)
    truth = steps(lambda _: 1.0, lambda _: None)[1]
    assert not {"gradient_norm_unclipped", "noise_trace"} & rows[0].keys()
    for i in range(1, 5):
        assert rows[i]["gradient_norm_unclipped"] == pytest.approx(lengths[i], rel=1e-5)
        assert rows[i]["noise_trace"] == pytest.approx(truth[i]["noise_trace"], rel=1e-4)


def test_a_loss_that_is_scaled_by_hand_and_clipped():
    """Where clipping hides by how much it was scaled, the length is left out."""
    lengths, rows = steps(lambda _: 60.0, lambda i: 0.05 if i in (2, 4) else None)
    for i in (1, 3):
        assert rows[i]["gradient_norm_unclipped"] == pytest.approx(lengths[i], rel=1e-5)
    for i in (2, 4):
        assert not {"gradient_norm_unclipped", "noise_trace"} & rows[i].keys()


def test_clipping_alone_is_no_scaling():
    lengths, rows = steps(lambda _: 1.0, lambda i: 0.02 * (1 + i % 3))
    found = [row["gradient_norm_unclipped"] for row in rows]
    assert found == pytest.approx(lengths, rel=1e-5)
    assert all("noise_trace" in row for row in rows)


def test_each_optimizer_has_its_scaler():
    a, b = network(), network()
    model = nn.ModuleList([a, b])
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (a, b)]
    scalers = [torch.amp.GradScaler("cpu", init_scale=s) for s in (2.0**6, 2.0**12)]
    with watched(model, optimizers) as watch:
        for _ in range(2):
            model.zero_grad()
            for part, scaler in zip((a, b), scalers, strict=True):
                scaler.scale(F.cross_entropy(part(X), Y)).backward()
            for optimizer, scaler in zip(optimizers, scalers, strict=True):
                scaler.unscale_(optimizer)
            lengths = length(model)
            nn.utils.clip_grad_norm_(a.parameters(), 0.01)
            for optimizer, scaler in zip(optimizers, scalers, strict=True):
                scaler.step(optimizer)
                scaler.update()
    assert watch.rows[-1]["gradient_norm_unclipped"] == pytest.approx(lengths, rel=1e-5)


def test_a_pass_between_two_optimizers():
    """What the first was given is not measured again in the second's pass, which adds to it."""
    a, b = nn.Linear(5, 5), network()
    model = nn.ModuleList([a, b])
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (a, b)]
    with watched(model, optimizers) as watch:
        for _ in range(3):
            model.zero_grad()
            squares = 0.0
            for part, optimizer in zip((a, b), optimizers, strict=True):
                F.cross_entropy(b(a(X)), Y).backward()
                squares += length(part) ** 2
                nn.utils.clip_grad_norm_(part.parameters(), 0.03)
                optimizer.step()
                if part is a:
                    b.zero_grad()
    assert watch.rows[-1]["gradient_norm_unclipped"] == pytest.approx(math.sqrt(squares), rel=1e-5)


def test_a_pass_that_uses_neither_the_first_nor_the_last_parameter():
    parts = {"a": nn.Linear(5, 4), "b": nn.Linear(5, 4), "c": nn.Linear(4, 3), "d": nn.Linear(4, 3)}
    model = nn.ModuleDict(parts)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watched(model, optimizer) as watch:
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(parts["d"](parts["a"](X)), Y).backward()
            F.cross_entropy(parts["c"](parts["b"](3 * X)), Y).backward()
            lengths = length(model)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
    assert watch.rows[-1]["gradient_norm_unclipped"] == pytest.approx(lengths, rel=1e-5)


class Checkpointed(nn.Module):
    """Its first and last parameters are in a backward pass inside of the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.first = nn.Linear(16, 16), nn.Linear(5, 16)
        self.out, self.z = nn.Linear(16, 3), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        def inside(h: Tensor) -> Tensor:
            return torch.tanh(self.z(torch.tanh(self.a(h))))

        return self.out(checkpoint(inside, torch.tanh(self.first(x)), use_reentrant=True))  # pyright: ignore


def test_reentrant_checkpoints():
    model = Checkpointed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watched(model, optimizer) as watch:
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(X), Y).backward()
            lengths = length(model)
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
    assert watch.rows[-1]["gradient_norm_unclipped"] == pytest.approx(lengths, rel=1e-5)


def test_a_closure_that_clips_and_is_called_again():
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=8)
    lengths: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        lengths.append(length(model))
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        return loss

    with watched(model, optimizer) as watch:
        for _ in range(2):
            lengths.clear()
            optimizer.step(closure)
    row = watch.rows[-1]
    assert row["gradient_norm_unclipped"] == pytest.approx(lengths[0], rel=1e-5)
    assert row["gradient_norm"] == pytest.approx(0.05, rel=1e-4)
