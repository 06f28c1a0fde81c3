"""Noise of the training's own gradients against exact per-sample gradients in float64."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

import lsa
from lsa.watching.draws import Draws
from lsa.watching.own_noise import averaged, estimates

N = 512


def setting() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 10), nn.Tanh(), nn.Linear(10, 3))
    x = torch.randn(N, 5)
    return model, x, (x @ torch.randn(5, 3)).argmax(1)


def exact(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """tr C and |G|² of the data."""
    rows = [
        torch.cat(
            [
                g.reshape(-1)
                for g in torch.autograd.grad(
                    F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters())
                )
            ]
        ).double()
        for i in range(N)
    ]
    g = torch.stack(rows)
    return float((g - g.mean(0)).square().sum(1).mean()), float(g.mean(0).square().sum())


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("k", [2, pytest.param(4, marks=pytest.mark.full)])
def test_accumulated_passes(k: int, clip: float | None, scaled: bool):
    """At a rate of 0, so that the truth stands still; samples drawn with replacement."""
    model, x, y = setting()
    trace, signal = exact(model, x, y)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
    rng, b = torch.Generator().manual_seed(k), 8
    options = {"budget": None, "track": False, "strict": True}
    with lsa.watch(model, optimizer, **options) as watch:  # it sees the scaler
        for _ in range(300):
            optimizer.zero_grad()
            for _ in range(k):
                some = torch.randint(N, (b,), generator=rng)
                scaler.scale(F.cross_entropy(model(x[some]), y[some]) / k).backward()
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
    rows = watch.rows
    for name, truth in (("noise_trace", trace), ("gradient_squared", signal)):
        values = np.array([row[name] for row in rows])
        assert abs(values.mean() - truth) < 3.5 * values.std() / math.sqrt(len(values))
    last = rows[-1]
    assert last["noise_scale_low"] < last["noise_scale"] < last["noise_scale_high"]
    inside = [
        row["noise_scale_low"] <= trace / signal <= row["noise_scale_high"]
        for row in rows[49::50]
        if "noise_scale" in row
    ]
    assert sum(inside) >= len(inside) - 1


def test_a_step_of_one_gradient_gives_none():
    model, x, y = setting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lsa.watch(model, optimizer, budget=None, track=False, strict=True) as watch:
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert all("noise_trace" not in row for row in watch.rows)


def test_gradients_that_a_training_asks_for_itself_are_none_that_a_step_adds_up():
    """By `torch.autograd.grad`, before, between and after the passes, as a penalty does."""
    rows = []
    for asks in (False, True):
        model, x, y = setting()
        parameters = [*model.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        with lsa.watch(model, optimizer, budget=None, track=False, strict=True) as watch:
            for part in (slice(0, 32), slice(32, 64)):
                loss = F.cross_entropy(model(x[part]), y[part]) / 2
                if asks:
                    torch.autograd.grad(loss, parameters, retain_graph=True)
                loss.backward(retain_graph=True)
                if asks:
                    torch.autograd.grad(loss, parameters)
            optimizer.step()
        rows.append({k: v for k, v in watch.rows[0].items() if k != "overhead"})
    assert rows[0]["noise_trace"] > 0 and rows[0] == rows[1]


def test_gradients_are_seen_in_steps_that_are_measured_and_only_there():
    model, x, y = setting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"norms": 4, "budget": None, "track": False, "strict": True}
    seen = []
    with lsa.watch(model, optimizer, **options) as watch:
        for step in range(1, 10):
            optimizer.zero_grad()
            for part in (slice(0, 32), slice(32, 64)):
                (F.cross_entropy(model(x[part]), y[part]) / 2).backward()
                seen.append((step, bool(watch._gradients.noise._hooks)))
            optimizer.step()
        hooks = watch._gradients.noise
    assert {step for step, hooked in seen if hooked} == {1, 5, 9}
    assert [row["step"] for row in watch.rows if "noise_trace" in row] == [1, 5, 9]
    assert not hooks._hooks


def test_the_probe_set_is_not_asked_again():
    model, x, y = setting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"batches": (x[:64], y[:64]), "every": 2, "measure": ["noise"], "strict": True}
    with lsa.watch(model, optimizer, budget=None, track=False, **options) as watch:
        for _ in range(4):
            optimizer.zero_grad()
            for part in (slice(0, 32), slice(32, 64)):
                (F.cross_entropy(model(x[part]), y[part]) / 2).backward()
            optimizer.step()
    assert all("noise_trace" in row and "noise_trace_se_data" not in row for row in watch.rows)


@pytest.mark.parametrize(("scale", "least"), [(40.0, 380), (200.0, 0), (1000.0, 0)])
def test_estimates_are_unbiased_and_the_interval_covers(scale, least, record_property):
    """Gaussian gradients of a known noise scale, by simulation."""
    rng = np.random.default_rng(0)
    d, b, n = 30, 4, 4
    G = np.ones(d) / math.sqrt(d)  # |G|² = 1, tr C = scale
    inside, told, right, means = 0, 0, 0, []
    for _ in range(400):
        seen: deque[tuple[float, float]] = deque(maxlen=50)
        for _ in range(50):
            a = G + math.sqrt(scale / d / b) * rng.standard_normal((n, d))
            each, whole = float((a[0] ** 2).sum()), float((a.mean(0) ** 2).sum())
            signal, trace = estimates(each, whole, n, b)
            seen.append((trace, signal))
        means.append(np.mean(list(seen), 0))
        found = averaged(seen, n * b)
        covers = (
            found.get("noise_scale_low", math.inf)
            <= scale
            <= found.get("noise_scale_high", math.inf)
        )
        inside += covers
        told += "noise_scale" in found
        right += "noise_scale" in found and covers
    trace, signal = np.array(means).T
    assert abs(trace.mean() - scale) < 3 * trace.std() / math.sqrt(400)
    assert abs(signal.mean() - 1) < 3 * signal.std() / math.sqrt(400)
    assert told >= least
    label = f"noise scale of watch, {scale:g} samples of 16; printed in {told}"
    label += f", of these inside {right / told:.0%}" if told else ""
    row = [label, "steps", "95 %", inside / 400, 400]
    record_property("coverage", row)
    assert inside / 400 > 0.92


def test_passes_of_two_losses_are_no_draws_of_one(caplog):
    """The discriminator of a GAN: real and generated samples, two backward passes, one step."""
    model, x, y = setting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    options = {"budget": None, "track": False, "strict": True}
    with lsa.watch(model, optimizer, every=1, norms=1, **options) as watch:
        for _ in range(40):
            optimizer.zero_grad()
            F.cross_entropy(model(x[:32]), y[:32]).backward()
            F.cross_entropy(model(3 * x[32:64]), y[32:64]).backward()
            optimizer.step()
    assert "noise_trace" not in watch.rows[-1] and "noise_scale" not in watch.rows[-1]
    assert caplog.text.count("no draws of one loss") == 1


def test_equal_draws_are_never_said_to_differ():
    rng = np.random.default_rng(0)
    for passes in (2, 4):
        for _ in range(50):
            draws = Draws()
            lengths = 1 + rng.chisquare(3, size=(300, passes))
            assert all(draws.alike(row.tolist()) for row in lengths)


@pytest.mark.parametrize("compresses", [False, True])
def test_hooks_by_which_processes_exchange_gradients(
    compresses: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """One that compresses gives another gradient than the mean, of which no noise follows."""

    def compressed(_state: Any, bucket: Any) -> Any:
        done = torch.futures.Future()
        done.set_result(0.8 * bucket.buffer())
        return done

    compressed.__annotations__.clear()  # which torch would read
    hook = compressed if compresses else default_hooks.allreduce_hook
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Linear(5, 3))
        model.register_comm_hook(None, hook)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with lsa.watch(model, optimizer, budget=None, track=False) as watch:
            for _ in range(2):
                optimizer.zero_grad()
                for _ in range(2):
                    (F.cross_entropy(model(torch.randn(6, 5)), torch.arange(6) % 3) / 2).backward()
                optimizer.step()
    finally:
        torch.distributed.destroy_process_group()
    assert ("noise_trace" in watch.rows[-1]) == (not compresses)
    assert ("compressed puts the processes' gradients together" in caplog.text) == compresses
