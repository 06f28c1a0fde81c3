"""What is registered, found and listed by what the store says of it: no file is read."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lsa.runtime.errors import InputError
from lsa.tracking import registered
from lsa.tracking.store import client

SOURCE = "/nowhere"


@pytest.fixture
def experiment(workplace):
    """An experiment in an empty store."""
    return client().create_experiment("tiny")


def run(experiment: str, step: str = "train") -> str:
    return client().create_run(experiment, tags={"lsa.step": step}).info.run_id


def version(run_id: str, seed: int = 0, name: str = "tiny.sgd", **tags: str) -> None:
    """Register something under the name, as lsa does."""
    if not client().search_registered_models(f"name='{name}'"):
        client().create_registered_model(name)
    project, _, optimizer = name.partition(".")
    own = {"project": project, "optimizer": optimizer, "seed": str(seed), "epoch": "2"}
    client().create_model_version(name, SOURCE, run_id, tags=own | tags)


def test_the_newest_version_is_meant_by_number_and_not_as_text(experiment):
    trained, other = run(experiment), run(experiment)
    for _ in range(10):
        version(trained)
    version(other, seed=1)
    assert registered.resolve(trained) == "models:/tiny.sgd/10"
    assert registered.resolve(other[:20]) == "models:/tiny.sgd/11"
    assert registered.find("tiny", "sgd", 0) == "models:/tiny.sgd/10"
    assert registered.find("tiny", "sgd", 1) == "models:/tiny.sgd/11"
    assert registered.resolve("models:/tiny.sgd@best") == "models:/tiny.sgd@best"


def test_what_is_not_there_is_told_with_what_is(experiment):
    version(run(experiment), seed=3)
    with pytest.raises(InputError, match=r"there is sgd \(seed 3\); make one with: lsa train"):
        registered.find("tiny", "sgd", 0)
    probed = run(experiment, "lanczos")
    with pytest.raises(InputError, match="it is a run of step lanczos and has registered none"):
        registered.resolve(probed)
    with pytest.raises(InputError, match=r"no checkpoint at models:/tiny\.sgd/7"):
        registered.training("models:/tiny.sgd/7")


def test_the_checkpoints_of_a_deleted_training_are_not_meant(experiment):
    older, deleted = run(experiment), run(experiment)
    version(older)
    version(deleted)
    for source, epoch in ((older, 1), (deleted, 1), (deleted, 2)):
        tags = {"lsa.key": "k", "project": "tiny", "epoch": str(epoch)}
        client().create_logged_model(experiment, name="sgd-s0", source_run_id=source, tags=tags)
    client().delete_run(deleted)
    assert registered.find("tiny", "sgd", 0) == "models:/tiny.sgd/1"
    assert [one.address for one in registered.listing("tiny")] == ["models:/tiny.sgd/1"]
    assert [epoch for epoch, _ in registered.trajectory("k")] == [1]
    assert list(registered.kept("tiny")[1]["k"]) == [1]
    with pytest.raises(InputError, match="its training is deleted; restore the run"):
        registered.resolve(deleted)
    client().delete_run(older)
    with pytest.raises(InputError, match="there is none of this project; make one with"):
        registered.find("tiny", "sgd", 0)


def test_a_checkpoint_is_named_in_one_way(experiment):
    version(run(experiment))
    address = "models:/tiny.sgd/1"
    assert registered.locate(None, "tiny", "sgd", 0) == (address, ("digits",))  # trusts the data
    assert registered.locate(address, None, None, None) == (address, ())
    with pytest.raises(InputError, match=r"both checkpoint=.* and optimizer=sgd are given"):
        registered.locate(address, None, "sgd", None)
    with pytest.raises(InputError, match="no checkpoint is named"):
        registered.locate(None, "tiny", None, None)


def test_versions_of_others_are_not_listed(experiment):
    version(run(experiment), seed=1)
    version(run(experiment), name="tiny.other", seed=0, epoch="last")
    client().create_registered_model("foreign")
    client().create_model_version("foreign", SOURCE, tags={"project": "tiny"})
    for name in ("tiny", None):
        (one,) = registered.listing(name)
        assert (one.address, one.optimizer, one.seed, one.epoch) == (
            "models:/tiny.sgd/1", "sgd", 1, 2,
        )  # fmt: skip
        assert one.numbers == {}
    assert registered.listing("another") == []


def test_a_trajectory_has_the_newest_of_every_epoch_that_was_sealed(experiment):
    def logged(epoch: int, **tags: str) -> str:
        tags |= {"project": "tiny", "epoch": str(epoch)}
        return client().create_logged_model(experiment, tags=tags).model_id

    sealed = {"lsa.key": "k"}
    logged(2, **sealed)
    ids = [logged(epoch, **sealed) for epoch in (10, 2)]
    logged(3)  # its training was killed before all of it was stored
    another = logged(2, **{"lsa.key": "other"})
    assert registered.trajectory("k") == [(2, ids[1]), (10, ids[0])]
    keys, epochs = registered.kept("tiny")
    assert epochs == {"k": {2: ids[1], 10: ids[0]}, "other": {2: another}}
    assert keys[another] == registered.key(another) == "other" and len(keys) == 4


def test_asking_loads_neither_torch_nor_matplotlib(experiment):
    version(trained := run(experiment))
    probed = (
        client()
        .create_run(experiment, tags={"lsa.step": "lanczos"}, run_name="lanczos-sgd-s0")
        .info.run_id
    )
    client().log_param(probed, "k", 2)
    code = f"""
import sys
from lsa.cli import app
for words in (["checkpoints"], ["show", "{trained}"], ["show", "{probed}"]):
    assert app.run(words) == 0
print({{"torch", "matplotlib"}} & set(sys.modules))
"""
    store = os.environ | {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=store, capture_output=True, text=True, check=True
    )
    said = done.stdout.splitlines()
    assert said[-1] == "set()" and "k=2" in done.stdout and "models:/tiny.sgd/1" in done.stdout


def test_the_command_that_makes_a_checkpoint_names_the_project_as_it_was_given(workplace):
    (workplace / "projects" / "tiny.yaml").rename(workplace / "my own.yaml")
    (workplace / "my own.yaml").write_text("name: tiny\n" + (workplace / "my own.yaml").read_text())
    with pytest.raises(InputError, match=r"--project 'my own\.yaml' --optimizer sgd --seed 0"):
        registered.locate(None, "my own.yaml", "sgd", None)
