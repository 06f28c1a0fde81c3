"""Whoever may write into a store may break no command of the others: one row for each way to try.

Every row is one run, checkpoint or version that somebody else has written beside ours.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
from typing import Any

import mlflow
import pytest

from lsa import project
from lsa.cli import app
from lsa.studies import train
from lsa.tracking import registered, runs, store

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own

STEP = {"project": "tiny", "lsa.step": "lanczos", "optimizer": "sgd", "seed": "0"}
CODES = "\x1b]0;owned\x07\x9b2J\u202e\u200b[bold]x"
DIGITS = "9" * 4990
RUNS: dict[str, dict[str, Any]] = {
    "a seed of thousands of digits": {"tags": STEP | {"seed": DIGITS}},
    "a seed beyond 64 bits": {"tags": STEP | {"seed": "9" * 30}},
    "a seed with two signs": {"tags": STEP | {"seed": "--5"}},
    "a sign without a seed": {"tags": STEP | {"seed": "-"}},
    "a seed in other digits": {"tags": STEP | {"seed": "\u0665"}},
    "no seed": {"tags": {"project": "tiny", "lsa.step": "train", "optimizer": "sgd"}},
    "a note without a number": {"tags": STEP | {"lsa.note.abc": "x", "lsa.note.": "y"}},
    "a note of a large number": {"tags": STEP | {f"lsa.note.{'9' * 200}": "x"}},
    "a value that is none": {"tags": STEP | {"lsa.not_finite.lanczos/x": "abc"}},
    "a training's value that is none": {
        "tags": STEP | {"lsa.step": "train", "lsa.not_finite.final/val_loss": "1_0"}
    },
    "beyond the year 9999": {"tags": STEP, "start_time": 10**15},
    "at the end of time": {"tags": STEP, "start_time": 2**63 - 1},
    "before all time": {"tags": STEP, "start_time": -(10**15)},
    "steps with the characters of a terminal": {"tags": STEP | {"lsa.step": CODES}},
    "an error with them": {"tags": STEP | {"lsa.error": CODES}},
    "an error without text": {"tags": STEP | {"lsa.error": "\n\n"}},
    "a step along nothing": {"tags": STEP | {"lsa.step": "trajectory."}},
    "a checkpoint that is no ID": {"tags": STEP, "params": {"checkpoint": "'; % \\"}},
    "a checkpoint of thousands of letters": {"tags": STEP, "params": {"checkpoint": "m" * 5000}},
    "numbers of samples that are none": {
        "tags": STEP, "params": {"checkpoint": "OURS", "n_samples": "x", "probes": "x"},
    },
    "options that are none": {
        "tags": STEP, "params": {"checkpoint": "OURS", "k": "x", "seed_b": "x"},
    },
    "options that command a terminal": {
        "tags": STEP, "params": {"checkpoint": "OURS", "k": CODES, "density_probes": "2"},
    },
    "a training with a seed that counts": {"tags": STEP | {"lsa.step": "train"}},
    "our training's key": {"tags": {"project": "tiny", "lsa.step": "train", "lsa.key": "OURS"}},
    "a process of a large number": {
        "tags": STEP | {"lsa.process": f"{2**80}@1", "lsa.host": "OURS"}, "running": True,
    },
    "a process without a number": {
        "tags": STEP | {"lsa.process": "x@1", "lsa.host": "OURS"}, "running": True,
    },
    "a process below nought": {
        "tags": STEP | {"lsa.process": "-5@1", "lsa.host": "OURS"}, "running": True,
    },
    "an artifact that is a list": {"tags": STEP, "artifact": []},
    "an artifact that is a number": {"tags": STEP, "artifact": {"metrics": 3}},
    "metrics without a unit": {"tags": STEP, "artifact": {"metrics": {"lambda_max": {}, "x": 1}}},
    "units that are none": {"tags": STEP, "artifact": {"metrics": {"lambda_max": {"unit": []}}}},
    "an artifact nested too deeply": {"tags": STEP, "artifact": "deep"},
}  # fmt: skip
CHECKPOINT = {"project": "tiny", "optimizer": "sgd", "seed": "0", "epoch": "1"}
CHECKPOINTS = {
    "an epoch of thousands of digits": CHECKPOINT | {"epoch": DIGITS},
    "an epoch that is no number": CHECKPOINT | {"epoch": "x"},
    "an epoch in other digits": CHECKPOINT | {"epoch": "\u0665"},
    "no epoch": {k: v for k, v in CHECKPOINT.items() if k != "epoch"},
    "a seed of thousands of digits": CHECKPOINT | {"seed": DIGITS},
    "names with the characters of a terminal": CHECKPOINT | {"optimizer": CODES},
    "a number that is missing": CHECKPOINT | {"epoch": "99"},
}


@pytest.fixture(scope="module")
def ours(tmp_path_factory, new_store):
    """The finished training of sgd in the tiny project, in a store of its own."""
    from conftest import PROJECT

    folder = tmp_path_factory.mktemp("hostile")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
            patched.delenv(name, raising=False)
        (folder / "projects").mkdir()
        text = PROJECT + "trajectory: {lanczos: {k: 1}}\n"
        text = text.replace("batch_size: 50", "batch_size: 50, checkpoint_every: 1")
        (folder / "projects" / "tiny.yaml").write_text(text)
        shutil.copy(new_store, folder)
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        mlflow.set_registry_uri(f"sqlite:///{folder}/mlflow.db")
        yield runs.read(train.train(project.load("tiny").recipe("sgd")).run_id)


def taken(capsys, *commands: list[str]) -> None:
    """Each command ends well, and says nothing that a terminal would obey."""
    capsys.readouterr()
    for command in commands:
        code, (out, error) = app.run(command), capsys.readouterr()
        assert code == 0 and not error, (command, error)
        assert all(c.isprintable() or c == "\n" for c in out), (command, out)


def written(ours, row: dict[str, Any]) -> str:
    """A row's run, made in the store; its ID."""
    client = store.client()
    experiment = client.get_experiment_by_name("tiny").experiment_id
    known = {"lsa.key": ours.tags["lsa.key"], "lsa.host": ours.tags["lsa.host"]}
    tags = {k: known[k] if v == "OURS" else v for k, v in row["tags"].items()}
    run = client.create_run(experiment, row.get("start_time"), tags, run_name=CODES).info.run_id
    for name, value in row.get("params", {}).items():
        client.log_param(run, name, ours.run_id if value == "OURS" else value)
    client.log_metric(run, "lanczos/lambda_max", 1.0)
    if "artifact" in row:
        content = row["artifact"]
        text = "[" * 99 + "]" * 99 if content == "deep" else json.dumps(content)
        client.log_text(run, text, "lanczos.json")
    if not row.get("running"):
        client.set_terminated(run)
    return run


@pytest.mark.parametrize("row", RUNS.values(), ids=RUNS)
def test_a_run_of_somebody_else_is_shown(ours, capsys, row):
    run = written(ours, row)
    taken(capsys, ["show", run], ["show", run, "--json"])


def test_runs_of_somebody_else_break_no_command_about_a_project(ours, capsys):
    for row in RUNS.values():
        written(ours, row)
    taken(capsys, ["study", "tiny", "--dry-run"], ["compare", "tiny"], ["report", "tiny"])
    taken(capsys, ["doctor", "--end-stale"])


def test_checkpoints_of_somebody_else_break_no_command(ours, capsys):
    client = store.client()
    experiment = client.get_experiment_by_name("tiny").experiment_id
    for tags in CHECKPOINTS.values():
        keyed = tags | {"lsa.key": ours.tags["lsa.key"]}
        made = client.create_logged_model(experiment, tags=keyed)
        client.create_model_version("tiny.sgd", f"models:/{made.model_id}", tags=tags)
    taken(capsys, ["checkpoints", "--json"], ["checkpoints"], ["study", "tiny", "--dry-run"])
    unknown = ["lanczos", "--project", "tiny", "--optimizer", "sgd", "--seed", "7"]
    assert app.run(unknown) == 2
    assert "sgd (seed 0); make one" in capsys.readouterr().err
    address = f"models:/{ours.tags['lsa.model_id']}"
    assert app.run(["lanczos", "--checkpoint", address, "--epochs", "all", "--k", "1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    listed = [one.run_id for one in registered.listing("tiny")]
    assert listed.count(ours.run_id) == 1


PLACES = {
    "a bucket that wants a login": "s3://bucket/x",
    "a service that is not there": "dbfs:/x",
    "an address that is none": "http://[",
    "a scheme that nobody knows": "junk:::",
    "a zero byte": "file:///a\0b",
    "a name longer than any": "file:///" + "x" * 5000,
    "a host's file": "file://host/x",
    "controls": "file:///nowhere\x9b31m",
    "another folder": "file:///proc/1/root/tmp",
    "nothing": "",
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
def test_files_that_a_run_says_to_be_anywhere_break_no_command(ours, capsys, place):
    """Whoever makes an experiment says where the files of its runs are."""
    with contextlib.closing(sqlite3.connect("mlflow.db")) as database, database:
        client, key = store.client(), ours.tags["lsa.key"]
        experiment = client.get_run(ours.run_id).info.experiment_id
        tags = {"lsa.step": "lanczos", "project": "tiny", "seed": "0", "optimizer": "sgd"}
        made = client.create_run(experiment, tags=tags | {"lsa.key": key}).info.run_id
        client.set_terminated(made)
        where = f"{place}/1/{made}/artifacts" if place else ""
        statement = "update runs set artifact_uri = ? where run_uuid = ?"
        database.execute(statement, (where, made))
    commands = [["show", made], ["show", made, "--json"], ["compare", "tiny"], ["report", "tiny"]]
    taken(capsys, *commands, ["checkpoints"], ["study", "tiny", "--dry-run"])
    assert app.run(["doctor"]) in (0, 1)
    assert "Traceback" not in capsys.readouterr().err
    again = train.train(project.load("tiny").recipe("sgd"), reuse=True)
    assert again.reused and again.run_id == ours.run_id
    client.delete_run(made)


def test_a_checkpoint_whose_files_are_said_to_be_anywhere_is_refused_in_one_line(ours, capsys):
    client = store.client()
    experiment = client.get_experiment_by_name("tiny").experiment_id
    for place in PLACES.values():
        made = client.create_logged_model(experiment, tags=CHECKPOINT)
        with contextlib.closing(sqlite3.connect("mlflow.db")) as database, database:
            statement = "update logged_models set artifact_location = ? where model_id = ?"
            database.execute(statement, (place, made.model_id))
        assert app.run(["lanczos", "--checkpoint", f"models:/{made.model_id}", "--k", "1"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
