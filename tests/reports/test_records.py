"""Runs and checkpoints as documents, and the commands that print them."""

from __future__ import annotations

import json
import math
import re

import mlflow
import pytest

from lsa import probe
from lsa.cli import app, show
from lsa.reports import records
from lsa.runtime.errors import InputError
from lsa.tracking import recording, registered, runs, store

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own
RUN = {
    "run", "name", "step", "status", "error", "started", "seconds", "project", "optimizer", "seed",
    "checkpoints", "parameters", "metrics", "notes", "figures", "artifacts",
}  # fmt: skip
SHORT = ["--k", "1", "--density_probes", "0", "--split", "no"]


def printed(capsys, *arguments: str):
    """The one JSON document on stdout."""
    capsys.readouterr()
    assert app.run([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def measured(trained):
    """A training and a probe of it."""
    assert app.run(["lanczos", "--optimizer", "sgd", "--project", "tiny", *SHORT]) == 0
    return trained


def test_a_probe_run_shows_all_that_was_logged(measured, capsys):
    shown = printed(capsys, "show", measured.run_id, "--step", "lanczos")
    assert shown.keys() == RUN
    assert (shown["step"], shown["status"], shown["optimizer"]) == ("lanczos", "FINISHED", "sgd")
    assert shown["checkpoints"] == [{"address": "models:/tiny.sgd/1", "run": measured.run_id}]
    assert shown["parameters"]["k"] == {"value": 1, "default": 3}
    logged = runs.read(shown["run"]).metrics
    top = shown["metrics"]["lanczos/lambda_max"]
    error = logged["lanczos/lambda_max_se_data"]
    assert top["value"] == logged["lanczos/lambda_max"] and top["unit"] == "loss"
    assert top["standard_errors"] == {"data": error}
    assert shown["notes"][-1].startswith("measured on 64 of 200")
    assert [figure.rpartition("/")[2] for figure in shown["figures"]] == ["lanczos.png"]

    assert app.run(["show", shown["run"][:12]]) == 0
    text = capsys.readouterr().out
    assert f"± {2 * error:.2g} (data) loss\n" in text and "k=1  (default 3)" in text
    assert "max_products" not in text, "an option at its default"


def test_every_way_to_name_a_training_leads_to_it(measured, capsys):
    ways = [
        [measured.run_id],
        [measured.run_id[:10]],
        ["models:/tiny.sgd/1"],
        ["--optimizer", "sgd", "--project", "tiny"],
    ]
    shown = [printed(capsys, "show", *way) for way in ways]
    assert all(one == shown[0] for one in shown)
    assert (shown[0]["run"], shown[0]["step"]) == (measured.run_id, "train")
    assert shown[0]["parameters"]["optimizer.lr"] == {"value": "0.1", "default": None}
    assert app.run(["lanczos", "--checkpoint", measured.run_id[:10], *SHORT]) == 0


def test_a_failed_run_says_why(workplace, capsys):
    with (
        pytest.raises(InputError),
        recording.run("x", experiment="e", tags={}, device="cpu") as run,
    ):
        run.metrics({"a": math.inf, "b": 1.0})
        raise InputError("a bad thing")
    shown = printed(capsys, "show", run.id)
    assert (shown["status"], shown["error"], shown["seed"]) == ("FAILED", "a bad thing", None)
    assert shown["metrics"]["a"]["value"] == "inf", "JSON has no such number"
    assert app.run(["show", run.id]) == 0
    assert "a bad thing" in capsys.readouterr().out


def test_what_is_not_there_gets_one_line(workplace, capsys):
    cases = [
        ([], "no run is named"),
        (["nope"], "no run 'nope'"),
        (["%"], "no run '%'"),
        (["models:/tiny.sgd/1"], "no checkpoint at models:/tiny.sgd/1"),
        (["--optimizer", "sgd", "--project", "tiny"], "make one with: lsa train"),
        (["abc", "--optimizer", "sgd"], "give one"),
    ]
    for arguments, message in cases:
        assert app.run(["show", *arguments, "--json"]) == 2
        out, error = capsys.readouterr()
        assert message in error and error.count("\n") == 1 and out == ""


def test_a_step_that_has_not_run_is_named_with_its_command(trained, capsys):
    assert app.run(["show", trained.run_id, "--step", "sgd_noise"]) == 2
    assert f"lsa sgd_noise --checkpoint {trained.run_id}" in capsys.readouterr().err
    assert app.run(["show", trained.run_id, "--step", "lanzcos"]) == 2
    assert "did you mean 'lanczos'" in capsys.readouterr().err


def test_an_ambiguous_beginning_lists_what_it_may_be(workplace):
    experiment = mlflow.create_experiment("e")
    ids = set()
    while len({one[0] for one in ids}) == len(ids):  # until two begin alike
        ids.add(store.client().create_run(experiment).info.run_id)
    first = next(c for c in "0123456789abcdef" if sum(one[0] == c for one in ids) == 2)
    with pytest.raises(InputError, match="give more of its ID"):
        runs.by_prefix(first)
    for one in ids:
        assert runs.by_prefix(one).run_id == one


def test_checkpoints_are_listed_with_their_numbers(measured, capsys, monkeypatch):
    (shown,) = printed(capsys, "checkpoints")
    assert (shown["address"], shown["seed"], shown["epoch"]) == ("models:/tiny.sgd/1", 0, 2)
    assert shown["run"] == measured.run_id
    accuracy = shown["metrics"]["final/val_accuracy"]
    assert accuracy["value"] == measured["val_accuracy"].value
    error = measured["val_accuracy"].errors["data"]
    assert accuracy["standard_errors"] == {"data": error}
    assert "lanczos/lambda_max" in shown["metrics"]
    assert app.run(["checkpoints", "--project", "tiny"]) == 0
    text = capsys.readouterr().out
    assert "models:/tiny.sgd/1" in text and f"± {2 * error:.2g}" in text and "lambda_max" in text
    with monkeypatch.context() as narrow:
        narrow.setenv("COLUMNS", "60")
        narrow.setattr("sys.stdout.isatty", lambda: True)
        assert app.run(["checkpoints"]) == 0
    text = capsys.readouterr().out
    assert "models:/tiny.sgd/1 " in text and "also shows lanczos/lambda_max" in text
    assert printed(capsys, "checkpoints", "tiny") == [shown]
    assert printed(capsys, "checkpoints", "--project", "other") == []
    assert app.run(["checkpoints", "--project", "other"]) == 0
    assert "lsa train" in capsys.readouterr().out


def test_a_table_wider_than_the_terminal_continues_below(capsys, monkeypatch):
    with monkeypatch.context() as narrow:
        narrow.setenv("COLUMNS", "60")
        narrow.setattr("sys.stdout.isatty", lambda: True)
        cells = ["sgd_momentum", "4.722 ± 1.9", "-0.02315 ± 0.019", "204 ± 170"]
        headings = ["optimizer", "lambda_max", "lambda_min", "condition_number"]
        show.print_table(headings, [cells], "lanczos")
    text = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out)
    lines = [line.split() for line in text.splitlines()]
    assert lines.count(["optimizer", "lambda_max", "lambda_min"]) == 1
    assert lines.count(["optimizer", "condition_number"]) == 1
    assert sum(line[:1] == ["sgd_momentum"] for line in lines) == 2


def test_a_name_longer_than_the_terminal_leaves_room_for_the_numbers(capsys, monkeypatch):
    name = "a_name_of_more_letters_than_there_are_columns_" * 2
    with monkeypatch.context() as narrow:
        narrow.setenv("COLUMNS", "60")
        narrow.setattr("sys.stdout.isatty", lambda: True)
        show.print_table(["optimizer", "lambda_max"], [[name, "4.722 ± 1.9"]], "lanczos")
    text = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out)
    assert "4.722 ± 1.9" in text and max(map(len, text.splitlines())) <= 60
    assert name in re.sub(r"4\.722 ± 1\.9|\s", "", text)  # whole, over several lines


def test_a_longer_list_costs_no_more_requests(trained, monkeypatch):
    calls = []
    client = store.client

    def counted() -> mlflow.MlflowClient:
        calls.append(1)
        return client()

    monkeypatch.setattr(recording, "client", counted)
    monkeypatch.setattr(registered, "client", counted)
    assert len(records.checkpoints()) == 1
    of_one = len(calls)
    version = client().get_model_version("tiny.sgd", "1")
    for i in range(3):
        client().create_model_version(version.name, f"runs:/{i}/elsewhere", tags=version.tags)
    calls.clear()
    four = records.checkpoints()
    assert [one["address"][-1] for one in four] == ["1", "2", "3", "4"]
    assert four[0]["metrics"] != four[3]["metrics"] == {}
    assert len(calls) == of_one


def test_probes_are_listed_with_their_options(capsys):
    shown = {one["name"]: one for one in printed(capsys, "probes")}
    assert shown.keys() == probe.modules().keys()
    lanczos = shown["lanczos"]
    assert lanczos["options"]["k"] | {"help": ""} == {
        "type": "int", "choices": [], "default": 3, "help": "",
    }  # fmt: skip
    assert lanczos["options"]["split"]["choices"] == ["yes", "no"]
    assert [shown[name]["checkpoints"] for name in ("lanczos", "auto_neb")] == [1, 2]
    assert app.run(["probes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(shown)


@pytest.mark.parametrize(("command", "keys"), [("show", RUN), ("checkpoints", {"address", "run"})])
def test_the_help_documents_every_key(command, keys, capsys):
    assert app.run([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(key in shown for key in keys)
