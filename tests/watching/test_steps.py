"""Steps of unusual optimizers, and watches that end within one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lsa

X, Y = torch.randn(48, 5, generator=torch.Generator().manual_seed(1)), torch.arange(48) % 3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def watched(model: nn.Module, optimizer: Any, **options: Any) -> lsa.watching.Watch:
    given: dict[str, Any] = {"budget": None, "track": False, "every": 1, "strict": True}
    return lsa.watch(model, optimizer, **given | options)


def gradients(model: nn.Module, i: int) -> Tensor:
    loss = F.cross_entropy(model(X[i::3]), Y[i::3])
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()])])


def backward(model: nn.Module, i: int) -> Tensor:
    loss = F.cross_entropy(model(X[i::3]), Y[i::3])
    loss.backward()
    return loss


def test_a_pass_between_the_steps_of_two_optimizers_takes_nothing_away():
    """The first moves all parameters, so that it has taken the last gradient there is."""
    model = network()
    every = torch.optim.SGD(model.parameters(), lr=0.1)
    last = torch.optim.SGD(model[2].parameters(), lr=0.01)
    with watched(model, [every, last]) as watch:
        every.zero_grad()
        backward(model, 0)
        first = [p.grad.clone() for p in model[0].parameters()]
        every.step()
        last.zero_grad()
        backward(model, 1)
        second = [p.grad.clone() for p in model[2].parameters()]
        last.step()
    wanted = torch.cat([g.flatten() for g in (*first, *second)]).norm().item()
    assert watch.rows[0]["gradient_norm"] == pytest.approx(wanted, rel=1e-5)


FORKED = """
import os, signal, threading, time
from lsa.watching.undisturbed import undisturbed

begun = threading.Event()

def hold():
    with undisturbed():
        begun.set()
        time.sleep(1)

threading.Thread(target=hold).start()
begun.wait()
if not os.fork():
    signal.alarm(20)
    with undisturbed():
        os._exit(0)
raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.full
def test_a_child_that_is_forked_off_within_a_measurement_may_measure():
    assert subprocess.run([sys.executable, "-c", FORKED], timeout=60).returncode == 0


class Centred(torch.optim.SGD):
    """A class that calls the step of its base class."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """A step without what all outputs of a layer share."""
        for p in self.param_groups[0]["params"]:
            if p.ndim > 1:
                p.grad -= p.grad.mean(0)
        return super().step(closure)


def test_a_step_that_calls_that_of_its_base_class_is_one():
    """Torch puts its hooks on both where an optimizer of the base class was ever made."""
    torch.optim.SGD([nn.Parameter(torch.ones(1))])
    model = network()
    optimizer = Centred(model.parameters(), lr=0.1)
    with watched(model, optimizer, batches=(X, Y)) as watch:
        for i in range(3):
            optimizer.zero_grad()
            wanted = gradients(model, i).norm()
            backward(model, i)
            before = nn.utils.parameters_to_vector(model.parameters())
            optimizer.step()
            moved = nn.utils.parameters_to_vector(model.parameters()) - before
    assert [row["step"] for row in watch.rows] == [1, 2, 3]
    assert watch.rows[-1]["gradient_norm"] == pytest.approx(float(wanted), rel=1e-5)
    assert watch.rows[-1]["update_norm"] == pytest.approx(moved.norm().item(), rel=1e-5)


class Plain(torch.optim.Optimizer):
    """Steps along the gradients that a closure, or the step itself, makes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {"lr": 0.1})

    def move(self) -> None:
        """Move the weights."""
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p -= 0.1 * p.grad


class Searching(Plain):
    """Has the loss alone from its closure, as a line search has it."""

    def step(self, closure: Any) -> Any:  # pyright: ignore
        """One backward pass, and one more look at the loss."""
        loss = closure()
        self.zero_grad()
        loss.backward()
        self.move()
        closure()
        return loss


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_that_the_step_makes_itself(set_to_none: bool):
    model = network()
    optimizer, wanted = Searching(model), []
    with watched(model, optimizer) as watch:
        for i in range(3):
            wanted.append(float(gradients(model, i).norm()))
            optimizer.step(lambda i=i: F.cross_entropy(model(X[i::3]), Y[i::3]))
            optimizer.zero_grad(set_to_none)
    assert [row["gradient_norm"] for row in watch.rows] == pytest.approx(wanted, rel=1e-5)
    assert all(row["update_angle"] < 0.1 for row in watch.rows)


def test_gradients_that_are_there_before_a_closure_is_asked_for_the_loss():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watched(model, optimizer) as watch:
        for i in range(3):
            optimizer.zero_grad()
            wanted = float(gradients(model, i).norm())
            loss = backward(model, i).detach()
            optimizer.step(lambda loss=loss: loss)
    assert watch.rows[-1]["gradient_norm"] == pytest.approx(wanted, rel=1e-5)


class Asking(Plain):
    """Calls its closure with an argument, and sets and reads its attributes."""

    def step(self, closure: Any) -> Any:  # pyright: ignore
        """A step."""
        closure.calls += 1
        loss = closure(backward=True)
        self.move()
        return loss


class Given(Plain):
    """Takes a network in place of a closure."""

    def step(self, closure: Any) -> None:  # pyright: ignore
        """A step."""
        assert isinstance(closure, nn.Module)
        self.move()


class Closure:
    """A closure with an argument and an attribute."""

    calls = 0

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *, backward: bool = False) -> Tensor:
        """The loss."""
        self.model.zero_grad()
        loss = F.cross_entropy(self.model(X), Y)
        if backward:
            loss.backward()
        return loss


@pytest.mark.parametrize("make", [Asking, Given])
def test_closures_are_what_they_were(make: Callable[..., Any]):
    found = []
    for watches in (False, True):
        model = network()
        optimizer, closure = make(model), Closure(model)
        watch = watched(model, optimizer) if watches else None
        for _ in range(3):
            if make is Given:
                closure(backward=True)
            optimizer.step(model if make is Given else closure)
        found.append((nn.utils.parameters_to_vector(model.parameters()).tolist(), closure.calls))
        if watch is not None:
            watch.close()
            assert all(row["update_angle"] < 0.1 for row in watch.rows)
    assert found[0] == found[1]


class Failing(torch.optim.SGD):
    """Raises at its second step, as where there is not enough memory."""

    calls = 0

    def step(self, closure: Any = None) -> Any:
        """A step."""
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError("out of memory")
        return super().step(closure)


@pytest.mark.parametrize("closes", [False, True])
def test_a_step_that_raises_and_the_next_batch_in_its_place(closes: bool):
    model, loss = network(), nn.CrossEntropyLoss()
    optimizer, wanted = Failing(model.parameters(), lr=0.1), []

    def closure(i: int) -> Tensor:
        optimizer.zero_grad()
        value = loss(model(X[i::3]), Y[i::3])
        value.backward()
        return value

    with watched(model, optimizer, loss=loss) as watch:
        for i in range(3):
            length = gradients(model, i).norm().item()
            try:
                if closes:
                    value = optimizer.step(lambda i=i: closure(i))
                else:
                    value = closure(i)
                    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
                    optimizer.step()
            except RuntimeError:
                continue
            wanted.append((value.item(), length))
    name = "gradient_norm" if closes else "gradient_norm_unclipped"
    assert [row["loss"] for row in watch.rows] == pytest.approx([v for v, _ in wanted], rel=1e-5)
    assert [row[name] for row in watch.rows] == pytest.approx([n for _, n in wanted], rel=1e-5)


@pytest.mark.parametrize("kind", ["pre", "post"])
@pytest.mark.parametrize("first", [True, False])
def test_a_watch_that_is_closed_within_a_step(kind: str, first: bool):
    """By a hook of the training's, which torch calls beside those of the watch."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watches: list[lsa.watching.Watch] = []

    def hook(*_: Any) -> None:
        if watches and watches[0].step >= 2:
            watches[0].close()

    if first:
        getattr(optimizer, f"register_step_{kind}_hook")(hook)
    watches.append(watched(model, optimizer))
    for _ in range(2):
        getattr(optimizer, f"register_step_{kind}_hook")(hook)
    for i in range(4):
        optimizer.zero_grad()
        backward(model, i)
        optimizer.step()
    assert not watches[0].is_open
    assert len(watches[0].rows) == 2


@pytest.mark.parametrize("way", ["all", "last"])
def test_parameters_that_the_model_has_no_more(way: str, caplog: pytest.LogCaptureFixture):
    """The optimizer goes on moving those that were replaced, so no step is one of the model's."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watched(model, optimizer, batches=(X, Y), every=2, strict=False) as watch:
        for i in range(4):
            if i == 2 and way == "all":
                model.load_state_dict(
                    {k: v + 1 for k, v in model.state_dict().items()}, assign=True
                )
            if i == 2 and way == "last":
                model[2] = nn.Linear(8, 3)
            optimizer.zero_grad()
            backward(model, i)
            before = model[0].weight.detach().clone()
            optimizer.step()
    if way == "all":
        assert "SGD moves none of the model's 4 parameters" in caplog.text
        assert watch.rows[-1]["step"] == 3
    else:
        moved = float((model[0].weight.detach() - before).norm())
        assert 0 < watch.rows[-1]["update_norm/0"] < 2 * moved
        assert "update_norm/2" not in watch.rows[-1]
        expected = watch.rows[-1]["gain_second_order"]
        assert watch.rows[-1]["gain"] == pytest.approx(expected, rel=0.1)


def test_a_network_without_shapes_yet_is_told_in_one_line():
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(lsa.InputError, match="has no shape yet; run the network once"):
        watched(model, optimizer)
