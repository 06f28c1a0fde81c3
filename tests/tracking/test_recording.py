"""How a step's run ends."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import time
from collections.abc import Callable
from typing import Any

import mlflow
import pytest
import sqlalchemy
import sqlalchemy.event
from sqlalchemy.orm import loading

import lsa
from lsa import project
from lsa.cli import app as cli
from lsa.reports import measurements
from lsa.runtime import signals, variables
from lsa.studies import measure, plan, steps
from lsa.tracking import recording, runs, spool

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own


def once() -> Callable[[], None]:
    """What sends SIGTERM to this process the first time that it is called."""
    signs = [signal.SIGTERM]

    def strike() -> None:
        if signs:
            os.kill(os.getpid(), signs.pop())
            time.sleep(1)

    return strike


@pytest.fixture
def within_an_insertion():
    strike = once()

    def executed(cursor, text, parameters, _):
        if not text.startswith("INSERT INTO metrics"):
            return False
        cursor.executemany(text, parameters)
        strike()
        return True

    sqlalchemy.event.listen(sqlalchemy.Engine, "do_executemany", executed)
    yield
    sqlalchemy.event.remove(sqlalchemy.Engine, "do_executemany", executed)


@pytest.fixture
def within_a_result(monkeypatch):
    """Its first row is not read yet; metrics were inserted in the same transaction."""
    strike, processor = once(), loading._instance_processor

    def made(query, mapper, *arguments, **options):
        if mapper.class_.__name__ == "SqlLatestMetric":
            strike()
        return processor(query, mapper, *arguments, **options)

    monkeypatch.setattr(loading, "_instance_processor", made)


@pytest.mark.parametrize("struck", ["within_an_insertion", "within_a_result"])
def test_a_signal_within_a_statement_leaves_no_lock_on_the_database(workplace, request, struck):
    with (
        signals.caught(),
        pytest.raises(signals.Killed) as stop,
        recording.run("x", experiment="e", tags={}, device="cpu") as run,
    ):
        run.metrics({"loss": 1.0, "accuracy": 0.5})
        run.send()
        request.getfixturevalue(struck)
        run.metrics({"loss": 2.0, "accuracy": 0.6}, step=1)
        run.send()
    assert stop.value.run_ended
    ended = runs.read(run.id)
    assert ended.status == "KILLED"
    assert ended.metrics == {"loss": 2.0, "accuracy": 0.6}


# --- the run that `mlflow run` made ---------------------------------------------------------------


def made_by_mlflow(monkeypatch, **params: str) -> str:
    """A run as `mlflow run` makes it, named in the environment."""
    made = mlflow.MlflowClient().create_run("0", run_name="theirs").info.run_id
    for key, value in params.items():
        mlflow.MlflowClient().log_param(made, key, value)
    monkeypatch.setenv("MLFLOW_RUN_ID", made)
    return made


def test_python_leaves_the_users_own_run_alone(trained, monkeypatch):
    theirs = made_by_mlflow(monkeypatch)
    done = measure.measure("lanczos", lsa.load(trained.run_id), k=1)
    assert os.environ["MLFLOW_RUN_ID"] == theirs != done.run_id
    found = mlflow.MlflowClient().get_run(theirs)
    assert (found.info.status, found.info.run_name) == ("RUNNING", "theirs")
    assert not [tag for tag in found.data.tags if tag.startswith("lsa.")]
    assert mlflow.get_run(done.run_id).data.tags["mlflow.parentRunId"] == theirs


def test_the_command_line_continues_it_and_what_was_typed_is_understood(workplace, monkeypatch):
    file = "projects/tiny.yaml"
    theirs = made_by_mlflow(monkeypatch, project=file, epochs="2.0", optimizer="sgd")
    assert cli.run(["train", "--project", file, "--optimizer", "sgd", "--epochs", "2"]) == 0
    assert runs.read(theirs).status == "FINISHED" and "MLFLOW_RUN_ID" not in os.environ
    assert mlflow.get_run(theirs).data.params["project"] == file
    assert runs.read(theirs).params["project"] == "tiny"
    (measured,) = measurements.measured(project.load("tiny"))
    assert measured.done.run_id == theirs
    probed = made_by_mlflow(monkeypatch, project=file, checkpoint=theirs[:12])
    assert cli.run(["lanczos", "--project", file, "--checkpoint", theirs[:12], "--k", "1"]) == 0
    assert runs.newest_on(theirs, "lanczos") == runs.read(probed)
    states = {one.planned.step: one.state for one in plan.outlook(project.load(file))}
    assert states["train"] in ("reused", "new")


def test_a_run_of_another_store_is_refused(workplace, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    assert cli.run(["train", "--project", "tiny", "--optimizer", "sgd"]) == 2
    assert "which mlflow run has made, is not in sqlite:///" in capsys.readouterr().err
    assert mlflow.search_runs(search_all_experiments=True, output_format="list") == []


# --- the same step on two machines ----------------------------------------------------------------


@pytest.fixture
def two_machines(monkeypatch):
    """No lock is shared."""
    monkeypatch.setattr(steps.locks, "claim", lambda store, key: contextlib.nullcontext())


def beside(monkeypatch, target: object, name: str, other: Callable[[], object]) -> None:
    """Run another client's step just before a function is called for the first time."""
    function, others = getattr(target, name), [other]

    def called(*arguments: Any, **options: Any) -> Any:
        if others:
            others.pop()()
        return function(*arguments, **options)

    monkeypatch.setattr(target, name, called)


@pytest.mark.parametrize("moment", ["while it measures", "as it ends"])
def test_of_a_step_measured_twice_one_run_is_kept(
    trained, two_machines, monkeypatch, caplog, moment
):
    source, ids = lsa.load(trained.run_id), []
    place = (measure, "call_probe") if moment == "while it measures" else (recording.Run, "end")

    def measured() -> str:
        return measure.measure("lanczos", source, k=1, reuse=True).run_id

    def elsewhere() -> None:
        with monkeypatch.context() as other:
            other.setenv(variables.SPOOL, "elsewhere")
            ids.append(measured())

    beside(monkeypatch, *place, elsewhere)
    kept = measured()
    found = mlflow.search_runs(search_all_experiments=True, output_format="list")
    ends = {r.info.run_id: r.info.status for r in found if r.data.tags["lsa.step"] == "lanczos"}
    assert sorted(ends.values()) == ["FINISHED", "KILLED"] and ends[kept] == "FINISHED"
    assert ids == [kept] or moment == "as it ends"
    assert measured() == kept and "measured twice" in caplog.text


# --- a database that takes nothing ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("attempt to write a readonly database", "there is no permission"),
        ("database or disk is full", "the disk is full"),
        ("disk I/O error", "the disk fails"),
    ],
)
def test_a_database_that_takes_nothing_is_named_and_the_result_kept(trained, capsys, fault, said):
    def refuse(cursor: Any, text: str, *_: Any) -> None:
        if text.startswith(("INSERT", "UPDATE", "DELETE")):
            raise sqlite3.OperationalError(fault)

    events = ("do_execute", "do_executemany")
    for event in events:
        sqlalchemy.event.listen(sqlalchemy.Engine, event, refuse)
    try:
        code = cli.run(["train", "--project", "tiny", "--optimizer", "sgd"])
    finally:
        for event in events:
            sqlalchemy.event.remove(sqlalchemy.Engine, event, refuse)
    line = capsys.readouterr().err
    assert code == 75 and "does not answer" not in line
    assert said in line and "kept in .lsa/spool" in line and line.count("\n") == 1
    assert len(spool.entries()) == 1
