"""Training: reproducible, resumable, honest about divergence."""

from __future__ import annotations

import pytest
import torch

from lsa import data, serial
from lsa.project import Project
from lsa.train import Diverged, final_metrics, network, train

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
    assert {
        "train/loss", "train/accuracy", "train/gradient_norm", "train/weight_norm",
        "train/learning_rate", "train/seconds", "val/loss", "val/accuracy",
    } == set(epochs[0].metrics)  # fmt: skip
    assert epochs[-1].metrics["val/loss"] < epochs[0].metrics["val/loss"]
    assert epochs[-1].metrics["val/accuracy"] > 0.2  # chance is 0.1, and these are 20 steps
    assert epochs[-1].metrics["train/learning_rate"] < epochs[1].metrics["train/learning_rate"]


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
    found = final_metrics(network(recipe("sgd"), split), split)
    accuracy, error = found["final/val_accuracy"], found["final/val_accuracy_se_data"]
    assert error == pytest.approx((accuracy * (1 - accuracy) / 99) ** 0.5, rel=1e-6)


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
