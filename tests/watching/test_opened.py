"""A training is watched once: by cells that run again, by copies, and no longer than it lives."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lsa

KINDS: list[dict[str, Any]] = [
    {},
    {"batches": (torch.ones(8, 6), torch.arange(8) % 3), "every": 2},
    {"measure": ["noise_of_samples"], "every": 2},
]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    x, y = torch.randn(16, 6, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def watched(model: nn.Module, optimizer: Any, **options: Any) -> lsa.watching.Watch:
    given = {"budget": None, "track": False, "strict": True}
    return lsa.watch(model, optimizer, **(given | options))


def hooks(model: nn.Module, *optimizers: torch.optim.Optimizer) -> int:
    """How many there are on a network and its optimizers."""
    holders = [
        *(h for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks)),
        *(p._post_accumulate_grad_hooks for p in model.parameters()),  # pyright: ignore
        *(o._optimizer_step_pre_hooks for o in optimizers),
        *(o._optimizer_step_post_hooks for o in optimizers),
    ]
    return sum(len(holder or ()) for holder in holders)


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("optimizer_anew", [False, True])
def test_a_cell_that_runs_again_takes_the_place_of_the_watch_before(
    options: dict[str, Any], optimizer_anew: bool, caplog: pytest.LogCaptureFixture
):
    model = network()
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-2)]
    watches = [watched(model, optimizers[-1], **options)]
    once = hooks(model, *optimizers)
    trained(model, optimizers[-1])
    for _ in range(2):
        if optimizer_anew:
            optimizers.append(torch.optim.Adam(model.parameters(), lr=1e-2))
        watches.append(watched(model, optimizers[-1], **options))
        assert hooks(model, *optimizers) == once
        trained(model, optimizers[-1])
    assert [[row["step"] for row in watch.rows] for watch in watches] == [[1, 2, 3]] * 3
    lines = [line for line in caplog.messages if "the watch before is closed at step 3" in line]
    assert len(lines) == 2
    watches[-1].close()
    assert hooks(model, *optimizers) == 0


def test_watches_of_other_parameters_of_a_network_stay():
    """A trunk that two optimizers move, each with a head of its own."""
    model = nn.ModuleDict({"trunk": nn.Linear(6, 4), "a": nn.Linear(4, 3), "b": nn.Linear(4, 3)})
    x, y = torch.randn(16, 6), torch.arange(16) % 3
    heads = ("a", "b")
    optimizers = [
        torch.optim.SGD([*model["trunk"].parameters(), *model[head].parameters()], lr=0.1)
        for head in heads
    ]
    watches = [watched(model, optimizer) for optimizer in optimizers]
    for head, optimizer in zip(heads, optimizers, strict=True):
        model.zero_grad()
        F.cross_entropy(model[head](model["trunk"](x)), y).backward()
        optimizer.step()
    for watch in watches:
        watch.close()
    assert [len(watch.rows) for watch in watches] == [1, 1]


@pytest.mark.parametrize("options", KINDS)
def test_a_training_that_is_gone_takes_its_watch_with_it(options: dict[str, Any], workplace: Path):
    def function() -> tuple[Any, Any]:
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        watch = watched(model, optimizer, track=True, **options)
        trained(model, optimizer)
        return weakref.ref(model), weakref.ref(watch)

    model, watch = function()
    gc.collect()
    assert model() is None and watch() is None
    for thread in threading.enumerate():
        if thread.name == "lsa-watch-end":
            thread.join()
    (run,) = mlflow.MlflowClient().search_runs(["0"])
    assert run.info.status == "FINISHED"
    files = mlflow.MlflowClient().list_artifacts(run.info.run_id, "watch")
    assert {f.path for f in files} == {"watch/history.csv", "watch/watch.png"}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))])
def test_a_copy_of_a_watch_has_what_was_measured_and_watches_nothing(copied: Any):
    model = network()
    model.watch = watched(model, optimizer := torch.optim.Adam(model.parameters(), lr=1e-2))
    trained(model, optimizer)
    twin = copied(model.watch)
    assert twin.rows == model.watch.rows and twin.step == 3 and twin.alarms == []
    assert [*twin.history.columns] == [*model.watch.history.columns]
    assert twin.figure().axes
    trained(copy.deepcopy(model), torch.optim.Adam(model.parameters()))
    twin.loss(1.0)
    twin.close()
    trained(model, optimizer)
    assert len(model.watch.rows) == 6 and len(twin.rows) == 3
    model.watch.close()
    model.watch.loss(1.0)  # what a loop goes on to tell is not kept
    assert model.watch._losses.mean() is None
