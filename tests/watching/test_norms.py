"""Norms and angles of a step against one process, one batch and float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lsa
from lsa.maths.sums import inner, of_step
from lsa.watching import weights

SGD = {"lr": 0.1, "momentum": 0.9}


def setting() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    return model, torch.randn(24, 6), torch.randint(0, 3, (24,))


def exact_gradient(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    twin = copy.deepcopy(model).double()
    found = torch.autograd.grad(F.cross_entropy(twin(x.double()), y), list(twin.parameters()))
    return torch.cat([g.reshape(-1) for g in found])


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().double().reshape(-1) for p in model.parameters()])


def degrees(a: torch.Tensor, b: torch.Tensor) -> float:
    return math.degrees(math.acos(float(a @ b / a.norm() / b.norm())))


def watched(model: nn.Module, optimizer: Any, **options: Any) -> Any:
    return lsa.watch(model, optimizer, budget=None, track=False, every=1, strict=True, **options)


def test_every_number_of_a_step():
    model, x, y = setting()
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    expected, updates = [], []
    with watched(model, optimizer) as watch:
        for _ in range(4):
            before, g = flat(model), exact_gradient(model, x, y)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            updates.append(flat(model) - before)
            expected.append((g, updates[-1], flat(model)))
    rows = watch.history
    assert list(rows.step) == [1, 2, 3, 4]
    assert math.isnan(rows.turn_angle[0])
    for i, (g, u, theta) in enumerate(expected):
        row = rows.loc[i]
        assert row.gradient_norm == pytest.approx(g.norm().item(), rel=1e-5)
        assert row.update_norm == pytest.approx(u.norm().item(), rel=1e-5)
        assert row.weight_norm == pytest.approx(theta.norm().item(), rel=1e-6)
        assert row.update_ratio == pytest.approx((u.norm() / theta.norm()).item(), rel=1e-5)
        assert row.update_angle == pytest.approx(degrees(-g, u), abs=0.05)
        assert row["gradient_norm/0"] == pytest.approx(g[: 7 * 16].norm().item(), rel=1e-5)
        assert row["gradient_norm/2"] == pytest.approx(g[7 * 16 :].norm().item(), rel=1e-5)
        if i:
            assert row.turn_angle == pytest.approx(degrees(updates[i - 1], u), abs=0.05)


@pytest.mark.parametrize("clamped", [False, True])
def test_turn_angle_of_steps_that_are_not_all_measured(clamped: bool):
    """Also where weights are changed between the steps, as those of a critic are clamped."""
    model, x, y = setting()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    updates = []
    with watched(model, optimizer, norms=3) as watch:
        for _ in range(8):
            before = flat(model)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            updates.append(flat(model) - before)
            if clamped:
                for p in model.parameters():
                    p.detach().clamp_(-0.1, 0.1)
    assert list(watch.history.step) == [1, 4, 7]
    for step, angle in zip((4, 7), watch.history.turn_angle[1:], strict=True):
        exact = degrees(updates[step - 2], updates[step - 1])
        assert angle == pytest.approx(exact, abs=0.05)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("told", [False, True])
def test_gradient_norm_under_scaling_clipping_and_accumulation(
    fused: bool, clip: float | None, accumulate: int, told: bool
):
    model, x, y = setting()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=2)
    whole = []
    with watched(model, optimizer, scaler=scaler if told else None) as watch:
        for _ in range(3):
            whole.append(exact_gradient(model, x, y).norm().item())
            optimizer.zero_grad()
            for part, labels in zip(x.chunk(accumulate), y.chunk(accumulate), strict=True):
                scaler.scale(F.cross_entropy(model(part), labels) / accumulate).backward()
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
    rows = watch.history
    given = [min(norm, clip or norm) for norm in whole]
    assert rows.gradient_norm.tolist() == pytest.approx(given, rel=1e-4)
    assert rows.gradient_norm_unclipped.tolist() == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradient_norm_of_float16_passes(accumulate: int):
    """Against the gradients that the optimizer was given; noise too where there are two passes."""
    model, x, y = setting()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler, given = torch.amp.GradScaler("cpu", init_scale=2.0**12), []
    with watched(model, optimizer) as watch:
        for _ in range(10):
            optimizer.zero_grad()
            for part, labels in zip(x.chunk(accumulate), y.chunk(accumulate), strict=True):
                with torch.autocast("cpu", torch.float16):
                    loss = F.cross_entropy(model(part), labels) / accumulate
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            given.append(
                math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
            )
            scaler.step(optimizer)
            scaler.update()
    assert watch.history.gradient_norm.tolist() == pytest.approx(given, rel=1e-4)
    assert watch.history.gradient_norm_unclipped.tolist() == pytest.approx(given, rel=1e-4)
    assert all(("noise_trace" in row) == (accumulate > 1) for row in watch.rows)


def test_a_scale_that_is_not_known_gives_no_norm_before_clipping():
    model, x, y = setting()
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    with watched(model, optimizer) as watch:
        (2.0**16 * F.cross_entropy(model(x), y)).backward()
        for p in model.parameters():
            assert p.grad is not None
            p.grad /= 2.0**16
        optimizer.step()
    assert "gradient_norm_unclipped" not in watch.history


def test_losses_of_closures_and_of_modules():
    model, x, y = setting()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(model(x), y)
        value.backward()
        return value

    first, gradient = F.cross_entropy(model(x), y).item(), exact_gradient(model, x, y)
    with watched(model, optimizer) as watch:
        optimizer.step(closure)
    assert watch.history.loss[0] == pytest.approx(first)
    assert watch.history.gradient_norm[0] == pytest.approx(gradient.norm().item(), rel=1e-5)


def test_whole_sums_are_those_of_the_parameters():
    """The form that a GPU takes, where some gradients are missing."""
    rng = torch.Generator().manual_seed(0)
    a = [torch.randn(7, 3, generator=rng), None, torch.randn(5, generator=rng)]
    b = [torch.randn(7, 3, generator=rng) for _ in range(1)] + [torch.ones(2), torch.ones(5)]
    found = weights._sums([(a, a), (b, b), (a, b)])
    exact = [
        sum(
            float((x.double() * y.double()).sum())
            for x, y in zip(*pair, strict=True)
            if x is not None
        )
        for pair in ((a, a), (b, b), (a, b))
    ]
    assert found.shape == (3, 1)
    assert found[:, 0].tolist() == pytest.approx(exact, rel=1e-6)


def test_sums_of_ten_million_numbers():
    rng = torch.Generator().manual_seed(0)
    v = 1e-4 * torch.randn(10_000_000, generator=rng)
    v[:: 10**6] = 1.0
    exact = (v.double() @ v.double()).item()
    assert inner(v, v).item() == pytest.approx(exact, rel=2e-6)
    w = torch.randn(10_000_000, generator=rng)
    exact = (v.double() @ w.double()).item()
    assert abs(inner(v, w).item() - exact) < 2e-6 * float(v.norm() * w.norm())


def test_a_failure_is_said_once_and_switched_off(caplog: pytest.LogCaptureFixture):
    model, x, y = setting()
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    watch = lsa.watch(model, optimizer, budget=None, track=False)
    watch._norms.after = lambda *_, **__: 1 / 0  # pyright: ignore
    for _ in range(3):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    watch.close()
    assert [r.message for r in caplog.records] == [
        "watch: norms is off from step 1 on: division by zero"
    ]
    caplog.clear()  # what fails before the step, at its beginning or in its backward pass
    for name in ("_norms.before", "_gradients._passed"):
        with lsa.watch(model, optimizer, budget=None, track=False) as watch:
            part, method = name.split(".")
            setattr(getattr(watch, part), method, lambda *_, **__: 1 / 0)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert {r.message for r in caplog.records} == {
        "watch: norms is off from step 1 on: division by zero"
    }
    strict = lsa.watch(model, optimizer, budget=None, track=False, strict=True)
    strict._norms.after = lambda *_, **__: 1 / 0  # pyright: ignore
    with pytest.raises(ZeroDivisionError), strict:
        optimizer.step()


def test_bad_input():
    model, _, _ = setting()
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(lsa.InputError, match="moves none of the model's 4 parameters"):
        lsa.watch(model, other)
    with pytest.raises(lsa.InputError, match=r"not a torch\.optim\.Optimizer"):
        lsa.watch(model, "adam")  # pyright: ignore
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(lsa.InputError, match="budget=0 is no share"):
        lsa.watch(model, own, budget=0)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"every": "a"}, "every='a' is no number of steps"),
        ({"norms": 1.5}, "norms=1.5 is no number of steps"),
        ({"batches": 5}, "batches=5 holds no batches"),
        ({"measure": "noise"}, r"write \['noise'\]"),
        ({"alarm": -1}, "alarm=-1 is no number of measurements"),
        ({"scaler": 5}, r"scaler=5 has no get_scale\(\)"),
        ({"sink": 3}, "sink=3 cannot be called"),
        ({"track": 3}, "track=3 is neither"),
    ],
)
def test_options_that_are_no_such_thing_are_refused(options: dict[str, Any], line: str):
    model, _, _ = setting()
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    with pytest.raises(lsa.InputError, match=line):
        lsa.watch(model, optimizer, **({"track": False} | options))
    with pytest.raises(lsa.InputError, match="there is no optimizer"):
        lsa.watch(model, [], track=False)
    with pytest.raises(lsa.InputError, match="model is a NoneType"):
        lsa.watch(None, optimizer, track=False)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [0, 1, 100_003])
def test_sums_of_a_step_by_pieces(dtype: torch.dtype, n: int):
    """A few large numbers among small ones, against float64."""
    rng = torch.Generator().manual_seed(n)
    start, g, v, u = (torch.randn(n, generator=rng) for _ in range(4))
    g[:: max(1, n // 7)] *= 1e3
    start, g, v = start.to(dtype), g.to(dtype), v.to(dtype)
    now = (start.double() + 0.01 * u.double()).to(dtype)
    back = start.clone()
    found = of_step(back, now, g, v)
    assert torch.equal(back, start - now)
    exact = {"g": g.double(), "u": back.double(), "w": now.double(), "v": v.double()}
    pairs = ("gg", "uu", "ww", "gu", "uv")
    for value, (a, b) in zip(found.tolist(), pairs, strict=True):
        scale = float(exact[a].norm() * exact[b].norm())
        assert value == pytest.approx(float(exact[a] @ exact[b]), abs=1e-5 * scale)
    found = of_step(start.clone(), now, None, None)
    assert found[[0, 3, 4]].tolist() == [0, 0, 0]


def test_weights_in_another_order_of_memory():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 3))
    model = model.to(memory_format=torch.channels_last)
    x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 3
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    with watched(model, optimizer) as watch:
        for _ in range(3):
            before, g = flat(model), exact_gradient(model, x, y)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            u = flat(model) - before
    row = watch.rows[-1]
    assert row["gradient_norm"] == pytest.approx(g.norm().item(), rel=1e-5)
    assert row["update_norm"] == pytest.approx(u.norm().item(), rel=1e-5)
    assert row["update_angle"] == pytest.approx(degrees(-g, u), abs=0.05)
