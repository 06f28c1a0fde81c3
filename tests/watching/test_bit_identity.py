"""A training that is watched is the same to the last bit."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn
from watching.trainings import CASES

import lsa
from lsa.watching.probing import KINDS


def unwatched(*_: Any, **__: Any) -> Any:
    return contextlib.nullcontext()


def norms_alone(model: Any, optimizer: Any, *, scaler: Any = None, **_: Any) -> Any:
    return lsa.watch(model, optimizer, scaler=scaler, budget=None, track=False, strict=True)


def everything(model: Any, optimizer: Any, *, loader: Any, scaler: Any = None) -> Any:
    """All kinds of measurements, on batches of the training's own loader."""
    return lsa.watch(
        model,
        optimizer,
        batches=loader,
        loss=nn.CrossEntropyLoss(),
        measure=KINDS,
        every=2,
        scaler=scaler,
        budget=None,
        track=False,
        strict=True,
    )


def single_samples(model: Any, optimizer: Any, *, scaler: Any = None, **_: Any) -> Any:
    """Where they are not known, this is said and the training goes on."""
    kinds = ["noise_of_samples", "noise_of_blocks"]
    options = {"every": 2, "budget": None, "track": False, "measure": kinds}
    return lsa.watch(model, optimizer, scaler=scaler, **options)


def one_after_the_other(model: Any, optimizer: Any, *, loader: Any, **options: Any) -> Any:
    """Each takes the place of the one before."""
    stack = contextlib.ExitStack()
    stack.enter_context(everything(model, optimizer, loader=loader, **options))
    stack.enter_context(single_samples(model, optimizer, **options))
    stack.enter_context(everything(model, optimizer, loader=loader, **options))
    return stack


@pytest.mark.parametrize("case", CASES)
def test_measurements_of_single_samples_change_nothing(case: str):
    assert CASES[case](single_samples) == CASES[case](unwatched)


@pytest.mark.parametrize("case", ["plain", "batch norm", "dropout", "amp", "several", "closures"])
def test_watches_that_take_anothers_place_change_nothing(case: str):
    assert CASES[case](one_after_the_other) == CASES[case](unwatched)


@pytest.mark.parametrize("case", CASES)
def test_measurements_on_batches_change_nothing(case: str):
    assert CASES[case](everything) == CASES[case](unwatched)


@pytest.mark.parametrize("case", ["batch norm", "dropout", "closures"])
def test_measurements_that_raise_change_nothing(case: str, caplog: pytest.LogCaptureFixture):
    """In the middle of a pass, with θ in the network and random numbers drawn."""

    def failing(model: Any, optimizer: Any, *, loader: Any, **_: Any) -> Any:
        def objective(model: nn.Module, batch: Any) -> lsa.Terms:
            model(batch[0])
            torch.rand(3)
            raise ValueError("no such batch")

        return lsa.watch(
            model, optimizer, batches=loader, objective=objective, every=2, budget=None, track=False
        )

    assert CASES[case](failing) == CASES[case](unwatched)
    assert any("no such batch" in r.message for r in caplog.records)


@pytest.mark.parametrize("case", ["plain", "several", "closures"])
def test_an_objective_that_steps_the_optimizer_changes_nothing(
    case: str, caplog: pytest.LogCaptureFixture
):
    watches = []

    def stepping(model: Any, optimizer: Any, *, loader: Any, **_: Any) -> Any:
        last = optimizer[-1] if isinstance(optimizer, list) else optimizer

        def objective(model: nn.Module, batch: Any) -> lsa.Terms:
            loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
            last.step(lambda: loss)
            return lsa.Terms(loss * len(batch[0]), len(batch[0]))

        watches.append(
            lsa.watch(
                model, optimizer, batches=loader, objective=objective, every=2, budget=None,
                track=False,
            )
        )  # fmt: skip
        return watches[0]

    assert CASES[case](stepping) == CASES[case](unwatched)
    assert watches[0].step == 7
    assert "the objective steps the training's optimizer" in caplog.text


@pytest.mark.parametrize("case", CASES)
def test_norms_change_nothing(case: str):
    assert CASES[case](norms_alone) == CASES[case](unwatched)


def test_a_difference_would_show():
    def drawing(*_: Any, **__: Any) -> Any:
        torch.rand(1)
        return contextlib.nullcontext()

    assert CASES["dropout"](drawing) != CASES["dropout"](unwatched)
