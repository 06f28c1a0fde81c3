"""Numbers on the probe set against exact ones in float64."""

from __future__ import annotations

import copy
import functools
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

import lsa
from benchmarks.watch_oracles import crossing
from lsa.watching import budget
from lsa.watching.profile import profile, profile_of
from lsa.watching.spectrum import TOL


class Exact:
    """L of a network on some samples in float64, with all of its derivatives."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self.model, self.x, self.y = copy.deepcopy(model).double().eval(), x.double(), y

    def each(self, theta: Tensor) -> Tensor:
        """(N,)"""
        shapes = {name: p for name, p in self.model.named_parameters()}
        parts = theta.split([p.numel() for p in shapes.values()])
        named = {n: t.view_as(p) for (n, p), t in zip(shapes.items(), parts, strict=True)}
        outputs = torch.func.functional_call(self.model, named, (self.x,))
        return F.cross_entropy(outputs, self.y, reduction="none")

    def loss(self, theta: Tensor) -> Tensor:
        return self.each(theta).mean()

    def gradients(self, theta: Tensor) -> Tensor:
        """(N, d)"""
        return torch.autograd.functional.jacobian(self.each, theta)  # pyright: ignore

    def hessian(self, theta: Tensor) -> Tensor:
        return torch.autograd.functional.hessian(self.loss, theta)  # pyright: ignore


NOISE = re.compile("noise|gradient_(squared|diversity)")
watched = functools.partial(lsa.watch, budget=None, track=False)


def setting(width: int = 10, bend: type[nn.Module] = nn.Tanh) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, width), bend(), nn.Linear(width, 3))
    x = torch.randn(64, 5)
    return model, x, (x @ torch.randn(5, 3)).argmax(1)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    steps: int,
    batch: int = 16,
) -> list[Tensor]:
    """Weights in float64 before the first step and after each."""
    at = [parameters_to_vector(model.parameters()).detach().double()]
    for i in range(steps):
        part = slice(i * batch % len(x), i * batch % len(x) + batch)
        optimizer.zero_grad()
        F.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
        at.append(parameters_to_vector(model.parameters()).detach().double())
    return at


MAKERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02),
}


@pytest.mark.parametrize("bend", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("name", MAKERS)
def test_along_the_update(name: str, bend: type[nn.Module]):
    model, x, y = setting(bend=bend)
    optimizer = MAKERS[name](model.parameters())
    watch = watched(model, optimizer, batches=(x, y), measure=["update"], every=1, strict=True)
    exact = Exact(model, x, y)
    with watch:
        at = train(model, optimizer, x, y, 12)
    crossings = 0
    for row, start, end in zip(watch.rows, at[:-1], at[1:], strict=True):
        u = end - start
        H, each = exact.hessian(start), exact.gradients(start)
        slope, curvature = float(each.mean(0) @ u), float(u @ H @ u)
        # The fourth derivative is left: within 1 % of the largest curvature that u could have. With
        # kinks there are derivatives, which leave none.
        scale = float(torch.linalg.matrix_norm(H, 2) * (u @ u))
        assert row["directional_sharpness"] * float(u @ u) == pytest.approx(
            curvature, abs=(0.01 if bend is nn.Tanh else 1e-5) * scale, rel=0.01
        )
        assert row["probe_loss"] == pytest.approx(float(exact.loss(start)), rel=1e-6)
        change = float(exact.loss(end) - exact.loss(start))
        assert row["gain"] == pytest.approx(-change, rel=1e-3, abs=1e-6)
        assert row["gain_first_order"] == pytest.approx(-slope, rel=0.01, abs=1e-4)
        error = float((each @ u).std()) / math.sqrt(len(x))
        assert row["gain_first_order_se_data"] == pytest.approx(error, rel=0.02)
        assert row["gain_second_order"] == pytest.approx(-slope - curvature / 2, rel=0.02, abs=3e-4)
        if slope < 0:
            factor = crossing(lambda s, start=start, u=u: float(exact.loss(start + s * u)))
            assert row.get("critical_factor", math.nan) == pytest.approx(
                factor, rel=0.03, nan_ok=True
            )
            crossings += math.isfinite(factor)
        else:
            assert "critical_factor" not in row
    assert crossings >= 6


@pytest.mark.parametrize("length", [1.0, 1e-2, 1e-3, 1e-4, 1e-5])
def test_short_updates_are_measured_far_enough_or_left_out(length: float):
    model, x, y = setting()
    landscape = lsa.Landscape(model, x, y)
    exact = Exact(model, x, y)
    start = landscape.theta
    u = torch.randn(len(start), generator=torch.Generator().manual_seed(1))
    u *= length / u.norm()
    H = exact.hessian(start.double())
    truth = float(u.double() @ H @ u.double())
    found = profile(landscape, start, u)
    if length >= 1e-2:
        assert found.curvature == pytest.approx(truth, rel=0.03)
    elif math.isfinite(found.curvature):
        assert found.curvature == pytest.approx(truth, rel=1.0)
    else:
        assert length <= 1e-4
        assert "directional_sharpness" not in found.numbers(length**2)


def test_any_length_of_the_update_is_measured():
    """Points along it may come near the two that are known."""
    model, x, y = setting()
    landscape = lsa.Landscape(model, x, y)
    start = landscape.theta
    u = torch.randn(len(start), generator=torch.Generator().manual_seed(1))
    each = Exact(model, x, y).gradients(start.double())
    slope = float(each.mean(0) @ (u / u.norm()).double())
    for length in np.geomspace(1e-6, 1, 60):
        found = profile(landscape, start, float(length) * u / u.norm())
        for value, truth in ((found.slope, slope), (found.change, slope)):
            known = math.isfinite(value)
            assert known or length < 1e-4
            if known and length < 0.01:  # where the curvature is 1 % of it
                rel = 1 if length < 1e-4 else 0.1
                assert value == pytest.approx(float(length) * truth, rel=rel)


class Autocast(nn.Module):
    """A network that computes in bfloat16 by itself, as Accelerate has it do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x).float()


@pytest.mark.parametrize("objective", [None, lsa.objectives.supervised()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
def test_along_the_update_in_half_precision(dtype: torch.dtype | None, objective: Any):
    """Curvature and slope are of the size of the rounding of a loss; errors are told."""
    model, x, y = setting()
    model = Autocast(model) if dtype is None else model.to(dtype)
    x = x if dtype is None else x.to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    exact = Exact(model.inner if isinstance(model, Autocast) else model, x, y)
    options: dict[str, Any] = {"batches": (x, y), "measure": ["update"], "every": 1}
    with watched(model, optimizer, objective=objective, strict=True, **options) as watch:
        at = train(model, optimizer, x, y, 4, batch=64)
    for row, start, end in zip(watch.rows, at[:-1], at[1:], strict=True):
        u = end - start
        H, each = exact.hessian(start), exact.gradients(start)
        assert row["directional_sharpness"] == pytest.approx(float(u @ H @ u / (u @ u)), rel=0.03)
        assert row["gain_first_order"] == pytest.approx(-float(each.mean(0) @ u), rel=0.02)
        error = float((each @ u).std()) / math.sqrt(len(x))
        assert row["gain_first_order_se_data"] == pytest.approx(error, rel=0.03)
        change = float(exact.loss(end) - exact.loss(start))
        assert row.get("gain", -change) == pytest.approx(-change, rel=0.5)
        assert "critical_factor" not in row


def test_losses_in_half_precision_hide_what_is_smaller():
    """Of losses that are a function of θ alone, as where the network is spread over processes."""
    model, x, y = setting()
    exact = Exact(model, x, y)
    start = parameters_to_vector(model.parameters()).detach()
    u = -exact.gradients(start.double()).mean(0).float()

    def losses(theta: Tensor) -> Tensor:
        return exact.loss(theta.double()).bfloat16().double()[None]

    short = profile_of(losses, None, start, 0.1 * u, half=torch.bfloat16)
    assert not any(map(math.isfinite, (short.curvature, short.factor)))
    assert "directional_sharpness_se_data" not in short.numbers(1.0)
    long = profile_of(losses, None, start, 3 * u, half=torch.bfloat16)
    assert long.slope == pytest.approx(3 * float(u @ -u), rel=0.5)


def test_noise_scale_of_the_probe_set_is_unbiased():
    model, x, y = setting()
    x, y = x.repeat(8, 1) + 0.3 * torch.randn(512, 5), y.repeat(8)
    theta = parameters_to_vector(model.parameters()).detach().double()
    g = Exact(model, x, y).gradients(theta)
    trace = float((g - g.mean(0)).square().sum(1).mean())
    signal = float(g.mean(0).square().sum())
    inside, traces, signals = 0, [], []
    rng = torch.Generator().manual_seed(5)
    for _ in range(40):
        chosen = torch.randperm(512, generator=rng)[:64]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with watched(
            model,
            optimizer,
            batches=(x[chosen], y[chosen]),
            measure=["noise"],
            every=1,
            strict=True,
        ) as watch:
            train(model, optimizer, x, y, 1)
        row = watch.rows[0]
        traces.append(row["noise_trace"])
        signals.append(row["gradient_squared"])
        inside += abs(signals[-1] - signal) <= 2.36 * row["gradient_squared_se_data"]
    for values, truth in ((traces, trace), (signals, signal)):
        error = np.std(values) / math.sqrt(len(values))
        assert abs(np.mean(values) - truth) < 3 * error
        assert error < 0.1 * truth
    assert inside >= 34  # of 40, at a level of 95 %


@pytest.mark.parametrize("name", MAKERS)
def test_sharpness_against_the_dense_hessian(name: str):
    model, x, y = setting()
    optimizer = MAKERS[name](model.parameters())
    watch = watched(
        model, optimizer, batches=(x, y), measure=["sharpness", "lambda_max"], every=3, strict=True
    )
    exact, checked = Exact(model, x, y), 0
    errors: list[float] = []

    def agree(name: str, row: dict[str, float], wanted: float) -> None:
        value, residual = row[name], row[f"{name}_residual"]
        assert abs(value - wanted) <= residual + 1e-5 * wanted
        if residual <= 0.01 * value:
            assert value == pytest.approx(wanted, rel=2e-3)
        errors.append(abs(value / wanted - 1))

    def check(*_) -> None:
        nonlocal checked
        row = watch.rows[-1]
        if "lambda_max" not in row:
            return
        H = exact.hessian(parameters_to_vector(model.parameters()).detach().double())
        top = float(torch.linalg.eigvalsh(H)[-1])
        agree("lambda_max", row, top)
        state = lsa.training.stability.read(optimizer, list(model.parameters()))
        P = state.preconditioner(torch.zeros(len(H)))
        assert P is not None
        root = P.diagonal.rsqrt()
        felt = float(torch.linalg.eigvalsh(root[:, None] * H * root)[-1])
        agree("sharpness", row, felt)
        limit = state.threshold
        assert limit is not None
        assert row["threshold_ratio"] == pytest.approx(row["sharpness"] / limit[0])
        checked += 1

    handle = optimizer.register_step_post_hook(check)
    with watch:
        train(model, optimizer, x, y, 30)
    handle.remove()
    assert checked == 10
    assert sum(error <= TOL for error in errors) >= 18, "of 20, each in 7 products"
    assert np.median(errors) < TOL / 4


def test_where_there_is_no_preconditioner_lambda_max_is_measured_and_a_line_says_so(
    caplog: pytest.LogCaptureFixture,
):
    model, x, y = setting()
    optimizer = torch.optim.Rprop(model.parameters(), lr=1e-3)
    options = {"batches": (x, y), "measure": ["sharpness"], "every": 2}
    with watched(model, optimizer, strict=True, **options) as watch:
        train(model, optimizer, x, y, 6)
    assert [sum(name in row for row in watch.rows) for name in ("lambda_max", "sharpness")] == [
        3,
        0,
    ]
    (line,) = [r.message for r in caplog.records if "in place of sharpness" in r.message]
    assert "Rprop" in line


def test_batch_sharpness():
    model, x, y = setting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]
    with watched(model, optimizer, batches=batches, measure=["batch_sharpness"], every=1) as watch:
        at = train(model, optimizer, x, y, 1)
    values = []
    for part in batches:
        exact = Exact(model, *part)
        g = exact.gradients(at[1]).mean(0)
        values.append(float(g @ exact.hessian(at[1]) @ g / (g @ g)))
    row = watch.rows[0]
    assert row["batch_sharpness"] == pytest.approx(np.mean(values), rel=1e-3)
    assert row["batch_sharpness_se_data"] == pytest.approx(np.std(values, ddof=1) / 2, rel=1e-2)


def test_an_objective_gives_the_same_numbers():
    model, x, y = setting()
    rows = []
    for options in ({}, {"objective": lsa.objectives.supervised()}):
        twin = copy.deepcopy(model)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        batches = [(x[:32], y[:32]), (x[32:], y[32:])]
        kinds = ["update", "noise", "sharpness", "lambda_max", "batch_sharpness"]
        with watched(twin, optimizer, batches=batches, measure=kinds, every=1, **options) as watch:
            train(twin, optimizer, x, y, 2)
        rows.append(watch.rows[-1])
    # The noise is estimated from samples in one, from parts in the other.
    noise = [{k: row.pop(k) for k in [*row] if NOISE.match(k)} for row in rows]
    for name in ("noise_trace", "gradient_squared"):
        error = noise[1][f"{name}_se_data"]
        assert abs(noise[1][name] - noise[0][name]) < 3 * error
    rows = [{k: v for k, v in row.items() if k != "overhead"} for row in rows]
    assert rows[1] == pytest.approx(rows[0], rel=1e-2, abs=1e-4)


class Clock:
    """Time that passes when a sample is computed or the time is asked, not while others compute."""

    def __init__(self, model: nn.Module) -> None:
        self.now = 0.0
        model.register_forward_hook(lambda _model, inputs, _outputs: self.passes(len(inputs[0])))

    def passes(self, seconds: float) -> None:
        self.now += seconds

    def perf_counter(self) -> float:
        self.passes(0.01)  # what is timed takes time, however small it is
        return self.now


def test_a_budget_wins_over_every(monkeypatch: pytest.MonkeyPatch):
    model, x, y = setting(200)
    monkeypatch.setattr(budget, "time", Clock(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watched(model, optimizer, batches=(x, y), every=1, budget=0.2) as watch:
        train(model, optimizer, x, y, 2000)
    measured = [row for row in watch.rows if "probe_loss" in row]
    assert 1 <= len(measured) < 200
    assert all(row["overhead"] <= 0.2 for row in (*measured, watch.rows[-1]))


def test_bad_input():
    model, x, y = setting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(lsa.InputError, match="choose from update, noise"):
        watched(model, optimizer, batches=(x, y), measure=["hessian"])
    with pytest.raises(lsa.InputError, match="gives no batch"):
        watched(model, optimizer, batches=[])
