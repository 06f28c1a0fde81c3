"""Gradients of single samples, from a training's own passes, against one backward pass for each."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lsa
from lsa.watching.sample_noise import SampleNoise
from lsa.watching.weights import Weights

N = 6


class Language(nn.Module):
    """A causal language model with a tied head, a bias-free map and a layer that is used twice."""

    def __init__(self, width: int = 8, entries: int = 11, *, tied: bool = True) -> None:
        super().__init__()
        self.tokens = nn.Embedding(entries, width, padding_idx=0)
        self.places = nn.Parameter(0.1 * torch.randn(5, width))
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)
        self.scale = nn.RMSNorm(width)
        self.head = nn.Linear(width, entries, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places
        x = x + self.mix(torch.tanh(self.mix(self.norm(x))))
        return self.head(self.scale(x)).transpose(1, 2)


class Turned(nn.Module):
    """GPT-2's linear layer, with its weights the other way round."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(0.3 * torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


Turned.__name__ = "Conv1D"


def images(*layers: nn.Module) -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(N, 4, 9, 9)
    model(x)
    return model, x, torch.arange(N) % 3


def rows(*layers: nn.Module) -> tuple[nn.Module, Tensor, Tensor]:
    return nn.Sequential(*layers), torch.randn(N, 5), torch.arange(N) % 3


def sentences(tied: bool) -> tuple[nn.Module, Tensor, Tensor]:
    ids = torch.randint(11, (N, 5))
    return Language(tied=tied), ids, ids.roll(-1, 1)


SETTINGS: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor, Tensor]], set[str]]] = {
    "mlp": (lambda: rows(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), set()),
    "in place": (lambda: rows(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 3)), set()),
    "square, turned": (lambda: rows(Turned(5, 5), nn.Tanh(), Turned(5, 3)), set()),
    "convolutions": (
        lambda: images(
            nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.GroupNorm(2, 6), nn.ReLU(inplace=True),
            nn.Conv2d(6, 6, 3, groups=3, bias=False),
        ),
        set(),
    ),
    "tied language model": (lambda: sentences(True), {"places"}),
    "language model": (lambda: sentences(False), {"places"}),
}  # fmt: skip


def exact(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """∑ |cᵢ|² by parameter in float64, one sample at a time; the loss is a mean over samples."""
    twin = copy.deepcopy(model).double()
    found = torch.zeros(len([*twin.parameters()]), dtype=torch.float64)
    x = x.double() if x.is_floating_point() else x
    for i in range(N):
        loss = F.cross_entropy(twin(x[i : i + 1]), y[i : i + 1]) / N
        for j, g in enumerate(torch.autograd.grad(loss, [*twin.parameters()])):
            found[j] += g.square().sum()
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_squares_of_single_samples(name: str, caplog: pytest.LogCaptureFixture):
    torch.manual_seed(0)
    make, left = SETTINGS[name]
    model, x, y = make()
    weights = Weights(model, [torch.optim.SGD(model.parameters(), lr=0.1)])
    samples = SampleNoise(model, weights)
    handles = samples.attach(lambda: True)
    for again in range(2):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        found = samples.squares(N)
        wanted = exact(model, x, y)
        for one, value, truth in zip(weights.names, found, wanted, strict=True):
            if one in left:
                assert math.isnan(value), one
            else:
                assert float(value) == pytest.approx(float(truth), rel=1e-5), one
        assert ("leaves out places" in caplog.text) == bool(left)
        assert len(caplog.records) == len(left), "said once"
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * (again + 1) * torch.randn_like(p))
    for handle in handles:
        handle.remove()


def watched(model: nn.Module, optimizer: Any, **options: Any) -> Any:
    given = {"budget": None, "track": False, "strict": True, "every": 1}
    return lsa.watch(model, optimizer, measure=["noise_of_samples"], **(given | options))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("clip", [pytest.param(None, marks=pytest.mark.full), 0.05])
def test_noise_of_a_plain_loop_is_unbiased(clip: float | None, scaled: bool):
    """At a rate of 0, so that the truth stands still; samples drawn with replacement."""
    torch.manual_seed(0)
    n, b = 512, 16
    model = nn.Sequential(nn.Linear(5, 10), nn.Tanh(), nn.Linear(10, 3))
    x = torch.randn(n, 5)
    y = (x @ torch.randn(5, 3)).argmax(1)
    g = torch.func.vmap(
        torch.func.grad(
            lambda p, a, c: F.cross_entropy(torch.func.functional_call(model, p, (a,)), c)
        ),
        (None, 0, 0),
    )(dict(model.double().named_parameters()), x.double(), y)
    blocks = {"0": [], "2": []}
    for name, each in g.items():
        blocks[name[0]].append(each.detach().flatten(1))
    named = {block: torch.cat(each, 1) for block, each in blocks.items()}
    named[""] = torch.cat([*named.values()], 1)
    model.float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
    rng = torch.Generator().manual_seed(1)
    kinds = ["noise_of_samples", "noise_of_blocks"]
    options = {"budget": None, "track": False, "strict": True, "every": 1, "measure": kinds}
    with lsa.watch(model, optimizer, scaler=scaler if scaled else None, **options) as watch:
        for _ in range(400):
            optimizer.zero_grad()
            some = torch.randint(n, (b,), generator=rng)
            scaler.scale(F.cross_entropy(model(x[some]), y[some])).backward()
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
    for block, each in named.items():
        end = f"/{block}" if block else ""
        truth = {
            "noise_trace": float((each - each.mean(0)).square().sum(1).mean()),
            "gradient_squared": float(each.mean(0).square().sum()),
        }
        for name, value in truth.items():
            found = np.array([row[name + end] for row in watch.rows])
            assert abs(found.mean() - value) < 3.5 * found.std() / math.sqrt(len(found))
        scale = truth["noise_trace"] / truth["gradient_squared"]
        told = [r for r in watch.rows[49::50] if f"noise_scale{end}" in r]
        assert len(told) >= 6
        inside = [r[f"noise_scale_low{end}"] <= scale <= r[f"noise_scale_high{end}"] for r in told]
        assert sum(inside) >= len(inside) - 1


def train(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor, steps: int = 4) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def test_it_is_measured_at_every_nth_step_alone():
    model, x, y = SETTINGS["mlp"][0]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watched(model, optimizer, every=3, norms=10) as watch:
        train(model, optimizer, x, y, 7)
    assert [row["step"] for row in watch.rows if "noise_trace" in row] == [3, 6]


@pytest.mark.parametrize("penalised", [False, True])
def test_a_penalty_in_the_loss_is_no_part_of_samples(
    penalised: bool, caplog: pytest.LogCaptureFixture
):
    """Its part of the gradient is of all samples alike, so those parameters are left out."""
    model, x, y = SETTINGS["mlp"][0]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watched(model, optimizer) as watch:
        loss = F.cross_entropy(model(x), y)
        (loss + 0.1 * model[0].weight.square().sum() if penalised else loss).backward()  # pyright: ignore
        optimizer.step()
    assert "noise_trace" in watch.rows[0]
    assert ("leaves out 0.weight" in caplog.text) == penalised


def test_what_tells_no_samples_apart_is_said_once(caplog: pytest.LogCaptureFixture):
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
    x, y = torch.randn(N, 5), torch.arange(N) % 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watched(model, optimizer, strict=False) as watch:
        train(model, optimizer, x, y)
    assert len(watch.rows) == 4 and not any("noise_trace" in row for row in watch.rows)
    assert len(caplog.records) == 1 and "batch norm in training mode mixes" in caplog.text


def test_accumulated_passes_tell_it_without():
    model, x, y = SETTINGS["mlp"][0]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = []
    for kinds in (["noise_of_samples"], None):
        twin = copy.deepcopy(model)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        options = {"budget": None, "track": False, "strict": True, "every": 1, "measure": kinds}
        with lsa.watch(twin, optimizer, **options) as watch:
            for a, b in zip(x.chunk(2), y.chunk(2), strict=True):
                (F.cross_entropy(twin(a), b) / 2).backward()
            optimizer.step()
        rows.append(watch.rows[0])
    assert rows[0]["noise_trace"] == rows[1]["noise_trace"]


def test_bad_input():
    model, *_ = SETTINGS["mlp"][0]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(lsa.InputError, match="measure='sharpness' needs batches="):
        lsa.watch(model, optimizer, measure=["sharpness"])
    with pytest.raises(lsa.InputError, match="choose from update, noise"):
        lsa.watch(model, optimizer, measure=["hessian"])


class Positions(nn.Module):
    """Layers that see samples or positions first, with dropout between them."""

    def __init__(self, *, turned: bool) -> None:
        super().__init__()
        self.e, self.mix, self.drop = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Dropout(0.3)
        self.head, self.turned = nn.Linear(8, 3), turned
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        h = self.drop(torch.tanh(self.mix(self.e(ids.T if self.turned else ids))))
        return self.head(h.mean(0 if self.turned else 1))


@pytest.mark.parametrize("turned", [True, False])
def test_positions_are_not_taken_for_samples_where_both_are_as_many(
    turned: bool, caplog: pytest.LogCaptureFixture
):
    torch.manual_seed(0)
    model, ids, y = Positions(turned=turned), torch.randint(20, (N, N)), torch.arange(N) % 3
    weights = Weights(model, [torch.optim.SGD(model.parameters(), lr=0.1)])
    samples = SampleNoise(model, weights)
    handles = samples.attach(lambda: True)
    F.cross_entropy(model(ids), y).backward()
    state = torch.get_rng_state()
    found = samples.squares(N)
    assert torch.equal(state, torch.get_rng_state()) and model.calls == 1
    left = [name for name, v in zip(weights.names, found, strict=True) if math.isnan(v)]
    assert left == (["e.weight", "mix.weight", "mix.bias"] if turned else [])
    assert len(caplog.messages) == turned
    assert all("positions before samples" in line for line in caplog.messages)
    for handle in handles:
        handle.remove()


def test_positions_where_the_network_is_not_called_as_a_whole():
    torch.manual_seed(0)
    model, ids = Positions(turned=True), torch.randint(20, (N, N))
    samples = SampleNoise(model, Weights(model, [torch.optim.SGD(model.parameters(), lr=0.1)]))
    handles = samples.attach(lambda: True)
    model.forward(ids).sum().backward()
    with pytest.raises(lsa.InputError, match=f"{N} samples and as many positions"):
        samples.squares(N)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_penalty_that_begins_later_is_no_noise(name: str, caplog: pytest.LogCaptureFixture):
    torch.manual_seed(0)
    model, x, y = SETTINGS[name][0]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options: dict[str, Any] = {"measure": ["noise_of_samples"], "every": 1, "budget": None}
    with lsa.watch(model, optimizer, track=False, strict=True, **options) as watch:
        for step in range(5):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if step in (2, 3):
                loss = loss + 0.1 * sum(p.square().sum() for p in model.parameters())
            loss.backward()
            optimizer.step()
    found = [row.get("noise_trace") for row in watch.rows]
    assert found[2:4] == [None, None]
    assert found[1] == pytest.approx(found[0]) and found[4] == pytest.approx(found[0])
    assert sum("no longer the sum over the samples" in line for line in caplog.messages) == 1


@pytest.mark.parametrize("compiled", ["whole", "first"])
def test_what_is_compiled_in_place_stays_whole(compiled: str, caplog: pytest.LogCaptureFixture):
    """Hooks of the watch are no part of what is compiled, which must not be in pieces here."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    (model if compiled == "whole" else model[0]).compile(backend="eager", fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"measure": ["noise_of_samples"], "every": 1, "budget": None, "track": False}
    with lsa.watch(model, optimizer, **options) as watch:
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.ones(6, 5)), torch.arange(6) % 3).backward()
            optimizer.step()
    torch._dynamo.reset()
    assert ("noise_trace" in watch.rows[-1]) == (compiled == "first")
    line = "a compiled network hides" if compiled == "whole" else "leaves out 0.weight, 0.bias"
    assert line in caplog.text


def test_a_tied_table_under_autocast():
    """Its uses are then in two precisions."""
    torch.manual_seed(0)
    model, x, y = sentences(True)
    weights = Weights(model, [torch.optim.SGD(model.parameters(), lr=0.1)])
    samples = SampleNoise(model, weights)
    samples.attach(lambda: True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    i = weights.names.index("tokens.weight")
    found, wanted = samples.squares(N)[i], exact(model, x, y)[i]
    assert float(found) == pytest.approx(float(wanted), rel=0.02)


def test_a_network_whose_parts_are_called_is_told(caplog: pytest.LogCaptureFixture):
    model, x, y = rows(nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"measure": ["noise_of_samples"], "every": 1, "budget": None, "track": False}
    with lsa.watch(model, optimizer, **options) as watch:
        F.cross_entropy(model[0](x), y).backward()
        optimizer.step()
    assert "noise_trace" not in watch.rows[0]
    assert "no call of the network is seen" in caplog.text
