"""What a watch says in one line, and what it measures all the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lsa

X, Y = torch.randn(24, 5, generator=torch.Generator().manual_seed(1)), torch.arange(24) % 3
QUIET: dict[str, Any] = {"budget": None, "track": False, "every": 1}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))


def backward(model: nn.Module) -> None:
    model.zero_grad()
    F.cross_entropy(model(X), Y).backward()


class WithoutRate(torch.optim.Optimizer):
    """Its groups have no "lr"."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"alpha": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["alpha"] * p.grad)


class TwoCalls(torch.optim.SGD):
    """Steps by methods of its own, as some SAMs do."""

    def second(self) -> None:
        torch.no_grad()(lambda: [p.sub_(p.grad) for p in self.param_groups[0]["params"]])()


def test_an_optimizer_without_a_rate():
    model = network()
    optimizer = WithoutRate(model.parameters())
    with lsa.watch(model, optimizer, strict=True, **QUIET) as watch:
        backward(model)
        optimizer.step()
    (row,) = watch.rows
    assert "learning_rate" not in row
    assert row["update_norm"] == pytest.approx(0.1 * row["gradient_norm"], rel=1e-5)


@pytest.mark.parametrize(("samples", "line"), [(1, "hold one sample"), (2, "give more samples")])
def test_too_few_samples_for_noise(samples: int, line: str, caplog: pytest.LogCaptureFixture):
    model, few = network(), (X[:samples], Y[:samples])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    objective = lsa.objectives.supervised()
    with lsa.watch(model, optimizer, batches=few, objective=objective, **QUIET) as watch:
        for _ in range(2):
            backward(model)
            optimizer.step()
    (said,) = caplog.messages
    assert said.startswith("watch: noise is off from step 1 on: batches= ") and line in said
    assert "probe_loss" in watch.rows[-1]


def test_one_cause_is_said_once(caplog: pytest.LogCaptureFixture):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kinds = ["update", "noise", "sharpness", "lambda_max", "batch_sharpness"]
    batches = [{"x": X, "y": Y}]
    with lsa.watch(model, optimizer, batches=batches, measure=kinds, **QUIET):
        for _ in range(2):
            backward(model)
            optimizer.step()
    assert len(caplog.messages) == 1 and "a batch is a dict" in caplog.text
    caplog.clear()

    def objective(_model: nn.Module, batch: Any) -> lsa.Terms:
        if torch.is_grad_enabled():
            raise ValueError("no gradients today")
        return lsa.objectives.supervised()(_model, batch)

    given: dict[str, Any] = {"batches": [(X, Y)], "measure": kinds, "objective": objective}
    with lsa.watch(model, optimizer, **given, **QUIET):
        backward(model)
        optimizer.step()
    assert [line.split(": ")[-1] for line in caplog.messages] == ["no gradients today"]


def test_a_model_of_hugging_face_is_told_its_objective(caplog: pytest.LogCaptureFixture):
    class Model(nn.Module):
        config = None

        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(5, 3)

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
            return self.map(x)

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lsa.watch(model, optimizer, batches=[{"x": X, "labels": Y + 9}], **QUIET):
        backward(model)
        optimizer.step()
    (line,) = caplog.messages
    assert "for the loss of Model itself give objective=lsa.objectives.hf()" in line


def test_steps_that_no_hook_sees(caplog: pytest.LogCaptureFixture):
    model = network()
    optimizer = TwoCalls(model.parameters(), lr=0.1)
    with lsa.watch(model, optimizer, **QUIET) as watch:
        backward(model)
        optimizer.second()
    assert not watch.rows
    (line,) = caplog.messages
    assert "no step of the optimizer" in line
    lsa.watch(model, optimizer, **QUIET).close()  # without a training there is nothing to say
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("apart", [False, True])
def test_five_steps_of_a_critic_for_one_of_the_generator(
    apart: bool, caplog: pytest.LogCaptureFixture
):
    critic, generator = network(), network()
    both = nn.ModuleList([critic, generator])
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (critic, generator)]
    if apart:
        watches = [lsa.watch(m, o, **QUIET) for m, o in zip(both, optimizers, strict=True)]
    else:
        watches = [lsa.watch(both, optimizers, **QUIET)]
    for _ in range(3):
        for part, optimizer, n in zip(both, optimizers, (5, 1), strict=True):
            for _ in range(n):
                backward(part)
                optimizer.step()
    assert [watch.step for watch in watches] == ([15, 3] if apart else [3])
    assert [line.split(" for ")[0] for line in caplog.messages] == (
        [] if apart else ["watch: the first optimizer makes 5 steps"]
    )
    for watch in watches:
        watch.close()


def test_parameters_outside_of_the_model(caplog: pytest.LogCaptureFixture):
    model, temperature = network(), nn.Parameter(torch.tensor(5.0))
    optimizer = torch.optim.SGD([*model.parameters(), temperature], lr=0.1)
    with lsa.watch(model, optimizer, **QUIET):
        (temperature * model(X).square().mean()).backward()
        optimizer.step()
    (line,) = caplog.messages
    assert line.startswith("watch: 1 of the parameters that the optimizers move")


def test_weights_that_change_their_precision():
    model, x = network(), X
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lengths = []
    with lsa.watch(model, optimizer, strict=True, **QUIET) as watch:
        for step in range(4):
            if step == 2:
                model.double()
                x = X.double()
            optimizer.zero_grad()
            F.cross_entropy(model(x), Y).backward()
            g = torch.cat([p.grad.double().flatten() for p in model.parameters()])  # pyright: ignore
            lengths.append(float(g.norm()))
            optimizer.step()
    for row, length in zip(watch.rows, lengths, strict=True):
        assert row["gradient_norm"] == pytest.approx(length, rel=1e-6)
        assert row["update_norm"] == pytest.approx(0.1 * length, rel=1e-5)


@pytest.mark.parametrize("measure", [["noise_of_samples"], ["noise_of_blocks"]])
@pytest.mark.parametrize("passes", [1, 2])
def test_another_default_device(measure: list[str], passes: int):
    """Tensors of the watch's own are where it expects them."""
    model, rows = network(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for device in ("cpu", "meta"):
        options = {"measure": measure, "strict": True, **QUIET}
        with torch.device(device), lsa.watch(model, optimizer, **options) as watch:
            for _ in range(9):
                optimizer.zero_grad()
                for i in range(passes):
                    (F.cross_entropy(model(X[i::2]), Y[i::2]) / passes).backward()
                watch.loss(1.0)
                optimizer.step()
        rows.append([{k: v for k, v in row.items() if k != "overhead"} for row in watch.rows])
    assert rows[0] == rows[1]
    assert ("noise_trace" in rows[0][0]) == (passes == 2 or measure == ["noise_of_samples"])


@pytest.mark.parametrize("way", ["shuffled", "filled again"])
def test_batches_are_those_that_were_given(way: str):
    """Also where the training shuffles its data in place, or a loader fills the same tensors."""
    model, x, y = network(), X.clone(), Y.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def filled() -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(2):
            yield x.copy_(X.roll(i)), y

    batches = (x[:8], y[:8]) if way == "shuffled" else filled()
    given = [(X[:8], Y[:8])] if way == "shuffled" else [(X, Y), (X.roll(1), Y)]
    losses = [F.cross_entropy(model(a), b).item() for a, b in given]
    with lsa.watch(model, optimizer, batches=batches, strict=True, **QUIET) as watch:
        x.mul_(2)
        F.cross_entropy(model(X), Y).backward()
        optimizer.param_groups[0]["lr"] = 1e-3
        optimizer.step()
    assert watch.rows[0]["probe_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_another_default_precision():
    rows = []
    try:
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            model = network().float()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            options = {"measure": ["noise_of_samples"], "strict": True, **QUIET}
            with lsa.watch(model, optimizer, **options) as watch:
                for _ in range(3):
                    optimizer.zero_grad()
                    F.cross_entropy(model(X.float()), Y).backward()
                    optimizer.step()
            rows.append("noise_trace" in watch.rows[-1])
    finally:
        torch.set_default_dtype(torch.float32)
    assert rows == [True, True]


class WithBuffer(nn.Module):
    """Makes a buffer in its first pass, as caches of positions are made."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()
        self.register_buffer("shift", None)

    def forward(self, x: Tensor) -> Tensor:
        """The outputs, shifted."""
        if self.shift is None:
            self.shift = torch.full((3,), 0.5)
        return self.inner(x) + self.shift


def test_a_buffer_that_is_made_in_inference_mode():
    model = WithBuffer()
    with torch.inference_mode():
        model(X)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lsa.watch(model, optimizer, batches=(X, Y), strict=True, **QUIET) as watch:
        wanted = F.cross_entropy(model(X), Y).item()
        backward(model)
        optimizer.step()
    assert watch.rows[0]["probe_loss"] == pytest.approx(wanted, rel=1e-6)
