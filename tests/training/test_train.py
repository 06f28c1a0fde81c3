"""Training: reproducible, resumable, honest about divergence."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch import nn

from lsa.landscape import Landscape, flatten, noise_scale
from lsa.project import Augment, Named, Project, Train
from lsa.runtime.errors import Diverged, InputError
from lsa.tracking import serial
from lsa.training import data, models, steps
from lsa.training import train as training
from lsa.training.recipes import held_out, landscape_of
from lsa.training.train import final_metrics, network, train

SETTING = {
    "name": "t",
    "dataset": {"name": "digits"},
    "model": {"name": "mlp", "hidden": [16]},
    "train": {
        "epochs": 4,
        "batch_size": 64,
        "schedule": {"name": "cosine", "warmup_epochs": 1},
        "augment": {"crop": 1},
    },
    "optimizers": {
        "sgd": {"name": "SGD", "lr": 0.1, "momentum": 0.9},
        "adamw": {"name": "AdamW", "lr": 0.01},
        "sam": {"name": "SAM", "lr": 0.1},
        "wild": {"name": "SGD", "lr": 1e6},
    },
}

NOISE = ("noise_trace", "gradient_squared", "noise_scale", "gradient_diversity")

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


@pytest.fixture(scope="module")
def split() -> data.Data:
    return data.load("digits", train_limit=300, val_limit=100)


def recipe(optimizer: str, seed: int = 0):
    return Project.model_validate(SETTING).recipe(optimizer, seed)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "sam"])
def test_every_epoch_is_measured_and_training_learns(split, optimizer):
    epochs = list(train(recipe(optimizer), split))
    assert [e.number for e in epochs] == [1, 2, 3, 4]
    always = {
        "train/loss", "train/accuracy", "train/gradient_norm", "train/weight_norm",
        "train/learning_rate", "train/seconds", "val/loss", "val/accuracy",
        *(f"train/{name}{end}" for name in NOISE[:2] for end in ("", "_se_data")),
    }  # fmt: skip
    # The quotients only where their denominators are told from zero; else ends of intervals.
    ratios = {f"train/{name}{end}" for name in NOISE[2:] for end in ("", "_low", "_high")}
    assert always == set(epochs[0].metrics) - ratios
    assert epochs[-1].metrics["val/loss"] < epochs[0].metrics["val/loss"]
    assert epochs[-1].metrics["val/accuracy"] > 0.2  # chance is 0.1, and these are 20 steps
    assert epochs[-1].metrics["train/learning_rate"] < epochs[1].metrics["train/learning_rate"]


def test_a_last_batch_of_one_sample_under_batch_norm_is_refused_in_one_line(split, monkeypatch):
    def normed(input_shape, classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, classes), nn.BatchNorm1d(classes))

    monkeypatch.setitem(models.OURS, "normed", normed)
    update = {"model": Named(name="normed"), "train": Train(epochs=1, batch_size=299)}
    with pytest.raises(InputError, match="batch_size=299 leaves one of 300") as caught:
        next(train(recipe("sgd").model_copy(update=update), split))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [20, 512])
def test_figures_of_an_epoch_are_means_over_its_samples(split, monkeypatch, size):
    """With a step of nothing they are those of the initial weights, in passes or at once."""
    monkeypatch.setattr(training, "pass_size", lambda model, x: size)
    still = recipe("sgd").model_copy(
        update={"train": Train(epochs=1, batch_size=64), "rule": Named(name="SGD", lr=0.0)}
    )
    metrics = next(train(still, split)).metrics
    model = network(still, split).double()
    theta = flatten(model)
    whole = Landscape(model, split.x_train.double(), split.y_train)
    order = torch.randperm(len(split.y_train), generator=torch.Generator().manual_seed(0))
    norms = [len(i) * whole.subset(i).gradient(theta).norm().item() for i in order.split(64)]
    assert metrics["train/loss"] == pytest.approx(whole.loss(theta), rel=1e-6)
    assert metrics["train/accuracy"] == pytest.approx(1 - whole.evaluate(theta).error)
    assert metrics["train/gradient_norm"] == pytest.approx(sum(norms) / len(order), rel=1e-5)


def test_figures_of_steps_in_which_a_parameter_has_no_gradient():
    # Batches of 4 and 2.
    first = (
        torch.tensor([1.0, 9.0, 16.0]),
        [torch.tensor([True, False]), torch.tensor([True, True])],
    )
    second = (torch.tensor([4.0, 4.0]), [torch.tensor([False, True])])
    found = steps.means([first, second], 4)
    assert found == pytest.approx([(4 * 1 + 2 * 4) / 6, 4 / 6, (4 * 5 + 2 * 2) / 6])


@pytest.mark.parametrize(
    "step",
    [
        lambda self, closure=None: None,
        lambda self, closure=None: self.param_groups[0]["params"][0].grad.zero_(),  # of None
    ],
)
def test_an_optimizer_that_evaluates_nothing_is_refused_in_a_line(split, monkeypatch, step):
    monkeypatch.setattr(torch.optim.SGD, "step", step)
    with pytest.raises(InputError, match=r"SGD.step (does not call|fails before)"):
        next(train(recipe("sgd"), split))


def test_measuring_the_noise_changes_no_bit_of_the_training(split):
    with_it, without = recipe("adamw"), recipe("adamw")
    without = without.model_copy(
        update={"train": without.train.model_copy(update={"noise_scale": False})}
    )
    for a, b in zip(train(with_it, split), train(without, split), strict=True):
        assert torch.equal(a.state["rng"], b.state["rng"])
        for name, weight in a.state["model"].items():
            assert torch.equal(weight, b.state["model"][name]), name
        own = {k: v for k, v in a.metrics.items() if k in b.metrics and k != "train/seconds"}
        assert own == {k: v for k, v in b.metrics.items() if k != "train/seconds"}
        added = a.metrics.keys() - b.metrics.keys()
        assert {re.sub("_(se_data|low|high)$", "", k) for k in added} <= {
            f"train/{name}" for name in NOISE
        }


def test_the_noise_of_an_epoch_is_that_of_its_weights_whoever_measures_it(split):
    last = list(train(recipe("sgd"), split))[-1]
    model = network(recipe("sgd"), split)
    model.load_state_dict(last.state["model"])
    landscape = Landscape(model, split.x_train, split.y_train)
    rng = torch.Generator().manual_seed(last.number)
    batches = map(landscape.subset, noise_scale.draw(landscape.n_samples, rng))
    found = noise_scale.of_batches(batches, flatten(model), landscape.n_samples)
    assert last.metrics["train/noise_trace"] == found.trace.value
    assert last.metrics["train/noise_trace_se_data"] == found.trace.error


@pytest.mark.parametrize(("name", "last"), [("simple_cnn", True), ("mlp", False)])
@pytest.mark.parametrize("augment", [{}, {"flip": True}])
def test_images_lie_as_convolutions_are_fast_with(split, monkeypatch, name, last, augment):
    """Whatever the split's layout is, and after what is done to a batch."""
    seen: list[torch.Tensor] = []

    def step(loop, parameters, x, *rest):
        seen.append(x)
        return torch.zeros(2), [torch.zeros(len(x), dtype=torch.bool)]

    monkeypatch.setattr(training, "take_step", step)
    at = recipe("sgd")
    images = torch.rand(len(split.y_train), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for memory_format in (torch.channels_last, torch.contiguous_format):
        x = images.contiguous(memory_format=memory_format)
        other = dataclasses.replace(split, x_train=x, x_val=x[: len(split.y_val)])
        budget = at.train.model_copy(update={"augment": Augment(**augment)})
        wanted = at.model_copy(update={"model": Named(name=name), "train": budget})
        next(train(wanted, other))
    assert {x.is_contiguous(memory_format=torch.channels_last) for x in seen} == {last}


def test_one_seed_gives_one_result_and_another_another(split):
    def weights(seed: int) -> torch.Tensor:
        return list(train(recipe("adamw", seed), split))[-1].state["model"]["1.weight"]

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "sam"])
def test_an_interrupted_run_goes_on_bit_for_bit(split, tmp_path, optimizer):
    whole = list(train(recipe(optimizer), split))[-1]
    running = train(recipe(optimizer), split)
    next(running)
    serial.save(next(running).state, tmp_path / "state")
    rest = list(train(recipe(optimizer), split, state=serial.load(tmp_path / "state")))
    assert [e.number for e in rest] == [3, 4]
    for name, value in whole.state["model"].items():
        assert torch.equal(value, rest[-1].state["model"][name])


def test_divergence_is_said_plainly(split):
    with pytest.raises(Diverged, match=r"diverged in epoch 1 .*lower its learning rate"):
        list(train(recipe("wild"), split))


def test_final_metrics_have_data_errors(split):
    whole = landscape_of(recipe("sgd"), split, network(recipe("sgd"), split))
    found = final_metrics(held_out(whole, split), whole)
    accuracy = found["val_accuracy"].value
    assert found["val_accuracy"].errors["data"] == pytest.approx(
        (accuracy * (1 - accuracy) / 99) ** 0.5, rel=1e-6
    )


def test_state_is_stored_without_pickle(tmp_path):
    tree = {1: [torch.arange(3), (1.5, None, "a")], "x": {"y": True}, "e": []}
    serial.save(tree, tmp_path / "t")
    found = serial.load(tmp_path / "t")
    assert torch.equal(found[1][0], torch.arange(3)) and found[1][1] == (1.5, None, "a")
    assert found["x"] == {"y": True} and found["e"] == []
    with pytest.raises(TypeError, match="without pickle"):
        serial.save({"f": print}, tmp_path / "t")
    (tmp_path / "t").write_bytes(b"\xff" * 40)
    with pytest.raises(serial.InputError, match="damaged"):
        serial.load(tmp_path / "t")
