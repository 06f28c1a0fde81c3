"""Training as a tracked step, against a real MLflow store: logged, kept, resumed, registered."""

from __future__ import annotations

import json
import sys

import mlflow
import pytest
import torch

import lsa
from lsa import project
from lsa.probe import Result
from lsa.runtime.errors import Diverged
from lsa.studies import train
from lsa.tracking import registered, registry, runs, serial, store
from lsa.tracking.checkpoint import load_data
from lsa.training import train as training

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # MLflow's and SQLAlchemy's own
    pytest.mark.usefixtures("global_rng_untouched"),
]


def run(run_id: str):
    return mlflow.MlflowClient().get_run(run_id)


def test_training_logs_and_registers(trained):
    found = run(trained.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params["optimizer"] == "sgd" and found.data.params["optimizer.lr"] == "0.1"
    assert len(mlflow.MlflowClient().get_metric_history(trained.run_id, "val/accuracy")) == 2
    assert {"lsa.threads", "lsa.device", "lsa.version.torch", "lsa.key"} <= found.data.tags.keys()
    assert trained.checkpoint == "models:/tiny.sgd/1"
    model = mlflow.get_logged_model(found.data.tags["lsa.model_id"])
    values = {m.key: m.value for m in model.metrics}
    assert values["final/val_accuracy"] == trained["val_accuracy"].value
    link = json.loads(model.tags["mlflow.modelVersions"])  # the UI's column "Registered models"
    assert [(v["name"], int(v["version"])) for v in link] == [("tiny.sgd", 1)]


def test_a_killed_training_goes_on_at_its_last_epoch(workplace, monkeypatch):
    recipe = project.load("tiny").recipe("sgd", epochs=3)
    original = training.train

    def interrupted(*arguments, **named):
        for epoch in original(*arguments, **named):
            yield epoch
            if epoch.number == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train(recipe)
    monkeypatch.setattr(training, "train", original)
    resumed = train.train(recipe)
    assert run(resumed.run_id).data.tags["lsa.resumed_epoch"] == "2"
    assert len(mlflow.MlflowClient().get_metric_history(resumed.run_id, "val/loss")) == 3
    fresh = train.train(recipe)
    assert fresh["val_loss"].value == resumed["val_loss"].value
    statuses = [r.info.status for r in mlflow.search_runs(
        search_all_experiments=True, output_format="list")]  # fmt: skip
    assert sorted(statuses) == ["FINISHED", "FINISHED", "KILLED"]


@pytest.mark.parametrize("content", [{"x": 1}, [], {"state": {}, "history": [], "run": "r"}])
def test_a_state_of_another_layout_only_costs_its_epochs(workplace, content):
    recipe = project.load("tiny").recipe("sgd", epochs=1)
    key = train.train_key(recipe, load_data(recipe, "cpu").hash, "cpu")
    file = train.SCRATCH / "training" / f"{store.step_name(key)}.safetensors"
    file.parent.mkdir(parents=True)
    serial.save(content, file)
    assert "lsa.resumed_from" not in runs.read(train.train(recipe).run_id).tags


def test_a_module_of_ones_own_is_code_of_the_training(workplace, monkeypatch):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(workplace))])
    file = workplace / "net_of_mine.py"
    named = {"name": "net_of_mine:make"}
    recipe = project.load("tiny").recipe("sgd")
    recipe = recipe.model_copy(update={"model": project.Named.model_validate(named)})
    keys = []
    for text in ("tanh", "tanh  # with a remark", "relu"):
        file.write_text(f"def make():\n    return torch.{text}\n")
        keys.append(train.train_key(recipe, "", "cpu"))
    assert keys[0] == keys[1] != keys[2]
    file.unlink()
    assert train.train_key(recipe, "", "cpu") not in keys  # what is not there is told elsewhere


def test_failures_end_the_run_failed_with_the_reason(workplace):
    with pytest.raises(Diverged):
        train.train(project.load("tiny").recipe("sgd", lr=1e30))
    (found,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert (
        found.info.status == "FAILED" and "lower its learning rate" in found.data.tags["lsa.error"]
    )


def kept(step: Result) -> list[tuple[int, str]]:
    return registered.trajectory(runs.read(step.run_id).tags["lsa.key"])


@pytest.fixture
def every_second(workplace) -> project.Project:
    """Five epochs, of which 0, 2, 4 and the last are kept."""
    file = workplace / "projects" / "tiny.yaml"
    budget = "train: {epochs: 5, batch_size: 50, checkpoint_every: 2}"
    file.write_text(file.read_text().replace("train: {epochs: 2, batch_size: 50}", budget))
    return project.load("tiny")


def test_checkpoints_on_the_way_are_kept_and_fetched(every_second):
    recipe = every_second.recipe("sgd")
    trained = train.train(recipe)
    assert [epoch for epoch, _ in kept(trained)] == [0, 2, 4, 5]
    assert kept(trained)[-1][1] == runs.read(trained.run_id).tags["lsa.model_id"]
    assert len(mlflow.MlflowClient().search_model_versions("name='tiny.sgd'")) == 1
    found = [registry.fetch(f"models:/{model_id}") for _, model_id in kept(trained)]
    assert [source.epoch for source in found] == [0, 2, 4, 5]
    models = [mlflow.MlflowClient().get_logged_model(model_id) for _, model_id in kept(trained)]
    ways = ["-epoch0", "-epoch2", "-epoch4", ""]
    assert [model.name for model in models] == [f"sgd-s0{way}" for way in ways]
    assert torch.equal(found[0].theta, found[0].theta_init)
    assert torch.equal(found[-1].theta, lsa.load(trained.checkpoint, device="cpu").theta)
    for source in found:
        own = source.training.evaluate(source.theta).loss
        assert registered.numbers(source.model_id)["final/train_loss"] == pytest.approx(own)
    assert trained["train_loss"].value == pytest.approx(own)  # of the run: the last one
    before = kept(trained)
    again = train.train(recipe)  # not reused: of the same training, only the last is another
    assert kept(again)[:-1] == before[:-1]
    assert kept(again)[-1] == (5, runs.read(again.run_id).tags["lsa.model_id"]) != before[-1]


def test_without_checkpoint_every_only_the_final_one_is_kept(trained):
    assert kept(trained) == [(2, runs.read(trained.run_id).tags["lsa.model_id"])]


@pytest.mark.parametrize("stage", ["log", "seal"])
def test_a_resumed_training_keeps_every_epoch_once(every_second, monkeypatch, stage):
    """Also when it dies between a checkpoint's files and its numbers."""
    original = getattr(registry, stage)
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:  # at epoch 2
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(registry, stage, interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train(every_second.recipe("sgd"))
    resumed = train.train(every_second.recipe("sgd"))
    assert runs.read(resumed.run_id).tags["lsa.resumed_epoch"] == "1"
    assert [epoch for epoch, _ in kept(resumed)] == [0, 2, 4, 5]
    models = mlflow.MlflowClient().search_logged_models(store.experiments())
    whole = [int(model.tags["epoch"]) for model in models if "lsa.key" in model.tags]
    assert sorted(whole) == [0, 2, 4, 5]
