"""Datasets, losses, schedules and models of one's own by name; clipping and averaged weights."""

from __future__ import annotations

import copy
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lsa.project import Project, Recipe, trusted_by
from lsa.runtime.errors import InputError
from lsa.training import data, losses, schedules
from lsa.training.recipes import check_fit, network
from lsa.training.train import Epoch, initial, train

PARTS = """
import numpy as np
import torch
from torch import nn

def waves(n=60):
    x = torch.linspace(-1, 1, n)[:, None]
    return (x, torch.sin(3 * x)), (x[::3].numpy(), np.sin(3 * x[::3].numpy()))

def tokens():
    x = torch.randint(0, 7, (40, 5), generator=torch.Generator().manual_seed(0))
    return (x, x.sum(1) % 3), (x, x.sum(1) % 3)

def short():
    return torch.zeros(3, 1), torch.zeros(2, 1)

def line(width=8):
    return nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1))

class Counting(nn.Linear):
    def __init__(self):
        super().__init__(1, 1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        np.random.rand()
        return super().forward(x)

def counting():
    return Counting()

def reader(classes):
    return nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(20, classes))

def quartic(outputs, targets, scale=1.0):
    return scale * (outputs - targets).pow(4).mean()

def quartic_of(scale=1.0):
    return lambda outputs, targets: quartic(outputs, targets, scale)

def parts(outputs, targets):
    return (outputs - targets).square()

def flat_waves():
    (x, y), (x_val, y_val) = waves()
    return (x, y[:, 0]), (x_val, y_val[:, 0])

def double(dtype=torch.float64):
    (x, y), held_out = waves()
    return (x.to(dtype), y.to(dtype)), held_out

def holes():
    (x, y), held_out = waves()
    x[5] = float("nan")
    return (x, y), held_out

def halving(epochs, every=1):
    return lambda step: 0.5 ** (step // every) if epochs else 0.0
"""
NAME = "parts_of_mine"


@pytest.fixture(autouse=True)
def parts(tmp_path: Path, monkeypatch):
    (tmp_path / f"{NAME}.py").write_text(PARTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield NAME
    sys.modules.pop(NAME, None)


def recipe(**changes) -> Recipe:
    setting = {
        "name": "own",
        "dataset": {"name": f"{NAME}:waves"},
        "model": {"name": f"{NAME}:line"},
        "loss": {"name": "MSELoss"},
        "optimizers": {"sgd": {"name": "SGD", "lr": 0.1}},
        "train": {"epochs": 3, "batch_size": 20},
    }
    return Project.model_validate(setting | changes).recipe("sgd")


def split_of(at: Recipe) -> data.Data:
    options = at.dataset.model_dump()
    return data.load(options.pop("name"), trusted=[NAME], **options)


def epochs_of(at: Recipe, state: Any = None) -> list[Epoch]:
    """Every epoch; the states are copies, since training goes on in the tensors that it yields."""
    return [copy.deepcopy(e) for e in train(at, split_of(at), trusted=[NAME], state=state)]


def test_a_regression_of_ones_own_trains_by_name_and_has_no_accuracy():
    at = recipe()
    assert trusted_by(at) == (NAME,)
    epochs = epochs_of(at)
    assert epochs[-1].metrics["val/loss"] < epochs[0].metrics["val/loss"]
    assert not any("accuracy" in name for epoch in epochs for name in epoch.metrics)


def test_tokens_reach_a_model_as_integers():
    dataset, model = {"name": f"{NAME}:tokens"}, {"name": f"{NAME}:reader"}
    at = recipe(dataset=dataset, model=model, loss={"name": "cross_entropy"})
    epochs = epochs_of(at)
    assert "train/accuracy" in epochs[-1].metrics and split_of(at).classes == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": {"name": f"{NAME}:parts"}}, r"returns shape \(2, 1\); it must return a scalar"),
        ({"loss": {"name": "NLLLoss"}}, r"does not take outputs \(2, 1\) with targets \(2, 1\): "),
        (
            {"dataset": {"name": f"{NAME}:flat_waves"}},
            r"targets \(2,\): .*different to the input size",
        ),
        ({"dataset": {"name": f"{NAME}:double"}}, "does not take float64 inputs .* in float32"),
        ({"train": {"augment": {"flip": True}}}, r"an input of .*waves has the shape \(1,\)"),
    ],
)
def test_parts_that_do_not_fit_are_told_before_the_training(changes, said):
    at = recipe(**changes)
    with pytest.raises(InputError, match=said):
        initial(at, split_of(at), [NAME])


def test_a_loss_that_broadcasts_by_chance_at_one_size_is_told():
    at = recipe(
        dataset={"name": f"{NAME}:tokens"},  # three classes
        model={"name": f"{NAME}:reader"},
        loss={"name": "MSELoss"},
    )
    with pytest.raises(InputError, match=r"does not take outputs \(2, 3\) with targets \(2,\)"):
        initial(at, split_of(at), [NAME])


def generators() -> list[Any]:
    return [
        torch.get_rng_state().tolist(),
        str(np.random.get_state(legacy=False)),
        random.getstate(),
    ]


def test_a_training_begins_where_nothing_was_tried():
    """Neither counters of the network nor the generators of NumPy and Python have moved."""
    at = recipe(model={"name": f"{NAME}:counting"})
    split = split_of(at)
    model = network(at, split, [NAME])
    calls, states = model.state_dict()["calls"].clone(), generators()
    check_fit(at, split, model, [NAME])
    assert model.state_dict()["calls"] == calls and generators() == states and model.training


def test_data_that_is_not_finite_is_no_divergence():
    with pytest.raises(InputError, match="holes has inputs or targets that are not finite"):
        epochs_of(recipe(dataset={"name": f"{NAME}:holes"}))


@pytest.mark.parametrize("name", [f"{NAME}:waves", f"{NAME}:halving", f"{NAME}:quartic"])
def test_nothing_of_ones_own_runs_without_trust(name):
    for build in (
        lambda: data.load(name),
        lambda: losses.build(name),
        lambda: schedules.schedule(name, epochs=1, steps_per_epoch=1),
    ):
        with pytest.raises(InputError, match="not trusted"):
            build()
    assert NAME not in sys.modules


@pytest.mark.parametrize("name", ["quartic", "quartic_of"])
def test_a_loss_is_a_function_or_what_makes_one(name):
    loss = losses.build(f"{NAME}:{name}", trusted=[NAME], scale=2.0)
    assert loss(torch.ones(2, 1), torch.zeros(2, 1)).item() == 2


def test_losses_of_torch_are_taken_by_name():
    outputs, y = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)), torch.arange(4) % 3
    assert losses.build() is F.cross_entropy
    smooth = losses.build("cross_entropy", label_smoothing=0.1)
    assert torch.equal(smooth(outputs, y), F.cross_entropy(outputs, y, label_smoothing=0.1))
    assert isinstance(losses.build("torch.nn:MSELoss"), nn.MSELoss)
    with pytest.raises(InputError, match="unknown loss 'MSLoss'"):
        losses.build("MSLoss")


@pytest.mark.parametrize(
    ("name", "options", "rule"),
    [
        ("torch.nn:NLLLoss", {"weight": "x"}, r"loss torch\.nn:NLLLoss cannot be made: .*str"),
        ("CrossEntropyLoss", {"weight": [1, "x"]}, r"loss CrossEntropyLoss cannot be made"),
        ("torch.nn:Module", {}, r"loss torch\.nn:Module computes nothing"),
    ],
)
def test_a_loss_of_torch_that_cannot_be_made_is_refused_in_one_line(name, options, rule):
    with pytest.raises(InputError, match=rule) as refused:
        losses.build(name, **options)
    assert "\n" not in str(refused.value)


def test_a_dataset_that_is_not_two_splits_is_refused_in_one_line():
    with pytest.raises(InputError, match=r"must return \(x, y\), \(x_val, y_val\)") as caught:
        data.load(f"{NAME}:short", trusted=[NAME])
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="has no option 'train_limit'"):
        data.load(f"{NAME}:waves", trusted=[NAME], train_limit=3)


def test_a_schedule_of_ones_own_counts_steps_and_takes_a_warm_up():
    options = {"epochs": 2, "steps_per_epoch": 10, "trusted": [NAME], "every": 5}
    factor = schedules.schedule(f"{NAME}:halving", **options)
    assert [factor(step) for step in (0, 5, 19)] == [1, 0.5, 0.125]
    warm = schedules.schedule(f"{NAME}:halving", warmup_epochs=1, **options)
    assert warm(4) == 0.5 and warm(19) == 0.125


def test_a_clipped_step_is_no_longer_than_the_limit():
    budget = {"epochs": 1, "batch_size": 60, "noise_scale": False, "clip_norm": 1e-3}
    at = recipe(train=budget)
    free = recipe(train=budget | {"clip_norm": None})
    (start,) = epochs_of(recipe(train=budget | {"clip_norm": 1e-12}))
    for wanted, clipped in ((at, True), (free, False)):
        (epoch,) = epochs_of(wanted)
        moved = [epoch.state["model"][k] - v for k, v in start.state["model"].items()]
        length = torch.cat([part.flatten() for part in moved]).norm().item()
        norm = epoch.metrics["train/gradient_norm"]
        assert norm > 1e-2, "what is logged is the gradient before it is clipped"
        assert length == pytest.approx(0.1 * (1e-3 if clipped else norm), rel=1e-3)


def test_averaged_weights_are_what_is_kept_and_training_goes_on_from_the_others():
    at = recipe(train={"epochs": 3, "batch_size": 20, "ema": 0.5})
    plain = recipe()
    averaged = epochs_of(at)
    stepped = epochs_of(plain)
    for one, other in zip(averaged, stepped, strict=True):
        for name, value in other.state["model"].items():
            assert torch.equal(one.state["stepped"][name], value)
    mean, last = averaged[-1].state["model"], stepped[-1].state["model"]
    assert not any(torch.equal(mean[name], last[name]) for name in mean)
    (resumed,) = epochs_of(at, averaged[1].state)
    assert all(torch.equal(resumed.state["model"][name], mean[name]) for name in mean)


def test_the_average_is_exponential_with_a_rising_decay():
    at = recipe(train={"epochs": 1, "batch_size": 60, "ema": 0.5})
    (epoch,) = epochs_of(at)  # one step, t = 0: decay 1/10
    start = recipe(train={"epochs": 1, "batch_size": 60, "clip_norm": 1e-12})
    (still,) = epochs_of(start)
    for name, now in epoch.state["stepped"].items():
        expected = 0.1 * still.state["model"][name] + 0.9 * now
        torch.testing.assert_close(epoch.state["model"][name], expected, rtol=1e-5, atol=1e-7)


class Averaging(torch.optim.SGD):
    """Steps at y and evaluates at x, one unit further: a stand-in for schedule-free."""

    calls: list[str]

    def train(self) -> None:
        self._move("train", -1.0)

    def eval(self) -> None:
        self._move("eval", 1.0)

    @torch.no_grad()
    def _move(self, name: str, by: float) -> None:
        self.__dict__.setdefault("calls", []).append(name)
        if self.calls != ["train"]:  # the first has nothing to undo
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(by)


def test_an_optimizer_is_switched_between_training_and_evaluation(monkeypatch):
    monkeypatch.setattr(torch.optim, "Averaging", Averaging, raising=False)
    at = recipe(optimizers={"sgd": {"name": "Averaging", "lr": 0.1}})
    plain = epochs_of(recipe())
    switched = epochs_of(at)
    for one, other in zip(switched, plain, strict=True):
        for name, value in other.state["model"].items():
            torch.testing.assert_close(one.state["model"][name], value + 1, rtol=1e-4, atol=1e-6)
