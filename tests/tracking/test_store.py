"""The store itself."""

from __future__ import annotations

import logging
import signal
import sqlite3

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from processes import forked

import lsa
from lsa import project
from lsa.runtime.errors import InputError
from lsa.studies import measure, train
from lsa.tracking import registered, registry, runs, store

KILLED_AT_WORK = """
import os, signal, sys
import mlflow.store.db.utils
from lsa.tracking import store
mlflow.store.db.utils._upgrade_db = lambda _: os.kill(os.getpid(), signal.SIGKILL)
mlflow.set_tracking_uri(sys.argv[1])
store.client()
"""


@pytest.mark.slow
def test_a_new_store_is_there_only_when_it_is_whole(tmp_path, monkeypatch):
    """MLflow by itself leaves half-made tables, which it can neither open nor finish."""
    uri = f"sqlite:///{tmp_path}/new.db"
    killed = forked(uri, code=KILLED_AT_WORK)
    assert killed.returncode == -signal.SIGKILL
    assert [file.name for file in tmp_path.iterdir()] == [".new.db.new"]
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: uri)
    store.client()
    assert [file.name for file in tmp_path.iterdir()] == ["new.db"]
    assert [e.name for e in mlflow.MlflowClient(uri, uri).search_experiments()] == ["Default"]


def test_a_store_where_nothing_can_be_written_is_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: f"sqlite:///{tmp_path}/file/new.db")
    with pytest.raises(InputError, match=r"cannot make the store .*/file/new\.db: Not a directory"):
        store.client()


def test_a_registry_of_its_own_is_made_whole_as_well(workplace):
    """Two workers that were the first to open it made its tables at once."""
    tracking, registry = store.addresses()[0], f"sqlite:///{workplace}/models.db"
    store.use(tracking, registry)
    store.client()
    with sqlite3.connect(workplace / "models.db") as database:
        tables = {name for (name,) in database.execute("select name from sqlite_master")}
    assert {"registered_models", "evaluation_datasets"} <= tables
    assert store.client().search_registered_models() == []
    assert not (workplace / ".models.db.new").exists()


def test_the_users_mlflow_logger_is_as_mlflow_made_it():
    assert logging.getLogger("mlflow").level == logging.INFO


# --- a registry that is not the tracking store's --------------------------------------------------


def apart(folder, name: str) -> str:
    """Use a registry of its own; its address."""
    registry = f"sqlite:///{folder}/{name}.db"
    store.use(store.uri(), registry)
    return registry


def addresses_in(registry: str) -> list[str]:
    versions = mlflow.MlflowClient(store.uri(), registry).search_model_versions("")
    return sorted(f"models:/{version.name}/{version.version}" for version in versions)


def test_a_registry_of_its_own_has_the_checkpoints_and_every_step_finds_them(workplace):
    own, other = store.uri(), apart(workplace, "models")
    recipe = project.load("tiny").recipe
    for name in ("sgd", "adamw"):
        trained = train.train(recipe(name))
        measure.measure("lanczos", lsa.load(optimizer=name, project="tiny"), k=1, density_steps=5)
        assert train.train(recipe(name), reuse=True).checkpoint == trained.checkpoint
    assert addresses_in(other) == ["models:/tiny.adamw/1", "models:/tiny.sgd/1"]
    assert addresses_in(own) == []
    assert [one.address for one in registered.listing()] == addresses_in(other)
    assert store.where() == f"{own} with the registry {other}"


def test_a_reused_training_is_registered_in_the_registry_that_is_in_use(trained, workplace):
    recipe = project.load("tiny").recipe("sgd")
    train.train(project.load("tiny").recipe("sgd", 1))  # the second version here
    second = train.train(project.load("tiny").recipe("sgd", 1), reuse=True)
    assert second.checkpoint == "models:/tiny.sgd/2" and second.reused
    other = apart(workplace, "models")
    with pytest.raises(InputError, match=r"no checkpoint with project=tiny.*with the registry"):
        registered.find("tiny", "sgd", 1)
    again = train.train(project.load("tiny").recipe("sgd", 1), reuse=True)
    assert again.reused and again.run_id == second.run_id
    assert again.checkpoint == "models:/tiny.sgd/1" == registered.find("tiny", "sgd", 1)
    assert addresses_in(other) == ["models:/tiny.sgd/1"]
    measured = measure.measure("lanczos", registry.fetch(again.checkpoint), k=1, density_steps=5)
    assert measured["lambda_max"].value > 0
    assert addresses_in(store.uri()) == ["models:/tiny.sgd/1", "models:/tiny.sgd/2"]
    assert train.train(recipe, reuse=True).run_id == trained.run_id


def test_a_checkpoint_whose_version_somebody_deleted_is_registered_anew(trained):
    store.client().delete_model_version("tiny.sgd", "1")
    again = train.train(project.load("tiny").recipe("sgd"), reuse=True)
    assert again.reused and again.run_id == trained.run_id
    assert registered.find("tiny", "sgd", 0) == again.checkpoint
    assert runs.read(trained.run_id).tags["lsa.checkpoint"] == again.checkpoint


def test_a_training_whose_checkpoint_somebody_deleted_is_trained_again(trained):
    store.client().delete_model_version("tiny.sgd", "1")
    runs.remove_models(trained.run_id, "sgd-s0", but="none")
    again = train.train(project.load("tiny").recipe("sgd"), reuse=True)
    assert not again.reused and again.run_id != trained.run_id
    assert registry.fetch(again.checkpoint).epoch == 2


def test_a_server_that_cannot_register_what_is_in_the_store_is_refused_before_a_training(workplace):
    """It answers 500 for ever: it looks for the checkpoint in its own store."""
    own = store.uri()
    store.use(own, "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"registry http://127\.0\.0\.1:9 is a server that cannot"):
        train.train(project.load("tiny").recipe("sgd"))
    store.use("http://LOCALHOST:5000/", "http://127.0.0.1:5000")
    store.client()  # is one server by two addresses


def test_a_store_that_does_not_answer_keeps_no_other_from_being_asked(workplace, tmp_path):
    def no_answer() -> str:
        raise MlflowException("API request failed with exception: connection refused")

    assert store.ask(no_answer, "silent") == "silent"
    assert store.ask(lambda: "answer", "silent") == "silent", "it did not, a moment ago"
    here = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'other.db'}")
    try:
        assert store.ask(lambda: "answer", "silent") == "answer"
    finally:
        mlflow.set_tracking_uri(here)


@pytest.mark.parametrize("name", ["log_batch", "set_tag", "set_terminated", "update_run"])
def test_what_may_come_twice_is_asked_again_where_an_answer_was_cut_off(monkeypatch, name):
    """A study's own run is not kept in the spool: a cut answer to one of its changes ended it."""
    calls = []

    def cut(*_: object) -> str:
        calls.append(name)
        if len(calls) == 1:
            raise MlflowException("failed with exception ('Connection broken: IncompleteRead(7)')")
        return "done"

    monkeypatch.setattr(mlflow.MlflowClient, name, cut)
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: "http://127.0.0.1:9")
    assert getattr(store._Client("http://127.0.0.1:9"), name)() == "done" and len(calls) == 2


def test_what_makes_something_is_not_asked_twice(monkeypatch):
    def cut(*_: object) -> None:
        raise MlflowException("failed with exception ('Connection broken: IncompleteRead(7)')")

    monkeypatch.setattr(mlflow.MlflowClient, "create_run", cut)
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: "http://127.0.0.1:9")
    with pytest.raises(MlflowException):
        store._Client("http://127.0.0.1:9").create_run("0")
