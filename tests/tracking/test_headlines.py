"""Numbers of probes on the runs of trainings."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import zlib
from urllib.parse import parse_qs, unquote

import mlflow

import lsa
from lsa import probe, project
from lsa.cli import app as cli
from lsa.studies import measure, overview
from lsa.tracking import descriptions, headlines, runs, views

BARRIER, ERROR = "auto_neb/barrier", "auto_neb/barrier_se_data"


def test_a_training_keeps_the_colour_of_its_optimizer_or_that_which_somebody_chose(trained):
    client, setting = mlflow.MlflowClient(), project.load("tiny")
    overview.bring_up(setting)
    assert runs.read(trained.run_id).tags["mlflow.runColor"] == "#0072B2"  # the report's first
    client.set_tag(trained.run_id, "mlflow.runColor", "#123456")
    overview.bring_up(setting)
    assert runs.read(trained.run_id).tags["mlflow.runColor"] == "#123456"


def test_the_experiment_of_earlier_checkpoints_says_where_the_last_ones_are(trained):
    client = mlflow.MlflowClient()
    earlier = client.create_experiment("tiny on the way")
    overview.bring_up(project.load("tiny"))
    experiment = client.get_run(trained.run_id).info.experiment_id
    said = client.get_experiment(earlier).tags["mlflow.note.content"]
    assert said.endswith(f"[tiny](#/experiments/{experiment}).")


def test_a_probes_run_says_what_it_measured_and_its_notes(trained):
    done = lsa.measure("lanczos", lsa.load(trained.run_id), k=1)
    said = runs.read(done.run_id).tags["mlflow.note.content"].split("\n")
    assert said[:2] == [probe.find("lanczos").summary, ""]
    assert said[2:] == [f"- {note}" for note in done.notes] and done.notes


def test_a_description_too_long_for_mlflow_keeps_its_links_and_whole_rows(trained):
    experiment = mlflow.MlflowClient().get_run(trained.run_id).info.experiment_id
    rows = "\n".join(f"| adamw_{i} | 0.5 ± 0.1 |" for i in range(999))
    descriptions.of_project([experiment], trained.run_id, f"Many.\n\n{rows}", [])
    text = runs.read(trained.run_id).tags["mlflow.note.content"]
    head, links = text.split("\n\n…\n\n")
    assert 4900 < len(text) <= 5000 and head.endswith("± 0.1 |") and "[Report](" in links


def test_trainings_in_two_experiments_are_compared_by_one_link(trained, monkeypatch):
    client = mlflow.MlflowClient()
    theirs = client.create_run("0").info.run_id  # as `mlflow run` makes it, in `Default`
    monkeypatch.setenv("MLFLOW_RUN_ID", theirs)
    assert cli.run(["train", "--project", "tiny", "--optimizer", "adamw"]) == 0
    overview.bring_up(project.load("tiny"))
    own = client.get_run(trained.run_id).info.experiment_id
    for experiment, ids in (("0", ["0", own]), (own, [own, "0"])):
        note = client.get_experiment(experiment).tags["mlflow.note.content"]
        (link,) = re.findall(r"\[All trainings, to compare\]\((.*?)\)", note)
        assert link.startswith("#/compare-experiments/s?")
        (asked,) = parse_qs(link.partition("?")[2])["experiments"]
        assert json.loads(asked) == ids
        searched = client.search_runs(ids, parse_qs(link)["searchFilter"][0])
        assert {run.info.run_id for run in searched} == {theirs, trained.run_id}
    assert "compare-experiments" in runs.read(theirs).tags["mlflow.note.content"]


def logged(**values: float) -> list:
    names = {"barrier": BARRIER, "error": ERROR}
    return [
        {"key": names[k], "value": v, "timestamp": 0, "step": 0, "model_id": "m"}
        for k, v in values.items()
    ]


def test_of_pairs_the_largest_stays_with_its_own_error():
    new = logged(barrier=0.5, error=0.1)
    assert headlines.worse(new, {}) == new
    assert headlines.worse(new, {BARRIER: 0.4, ERROR: 0.3}) == new
    assert headlines.worse(new, {BARRIER: 0.5, ERROR: 0.1}) == []  # as when it is sent twice
    assert headlines.worse(new, {BARRIER: 0.6, ERROR: 0.1}) == []


def test_a_training_shows_what_was_measured_at_its_end_and_not_on_the_way(trained):
    last = lsa.load(trained.run_id)
    done = lsa.measure("lanczos", last, k=1)
    found = runs.read(trained.run_id).metrics
    assert found["lanczos/lambda_max"] == done["lambda_max"].value
    assert found["lanczos/lambda_max_se_data"] == done["lambda_max"].errors["data"]
    assert found["lanczos/converged"] == 1 and "lanczos/products" not in found
    assert found["final/val_accuracy"] == trained["val_accuracy"].value
    earlier = dataclasses.replace(last, epoch=1)
    measure.measure("lanczos", earlier, k=2)
    assert runs.read(trained.run_id).metrics["lanczos/lambda_max"] == found["lanczos/lambda_max"]


def test_what_an_older_version_left_out_follows_and_a_deleted_training_stops_nobody(
    trained, monkeypatch
):
    lsa.measure("lanczos", lsa.load(trained.run_id), k=2)
    client = mlflow.MlflowClient()
    client.log_metric(trained.run_id, "lanczos/lambda_max", -1.0)
    setting = project.load("tiny")
    overview.bring_up(setting)
    assert runs.read(trained.run_id).metrics["lanczos/lambda_max"] > 0
    (version,) = client.search_model_versions("name = 'tiny.sgd'")
    assert "largest curvature" in (version.description or "")
    experiment = client.get_run(trained.run_id).info.experiment_id
    note = client.get_experiment(experiment).tags["mlflow.note.content"]
    assert "1 of the project's 2 optimizers" in note and "All trainings" in note
    view = json.loads(client.get_experiment(experiment).tags[views.TAG])
    packed = view["state"].removeprefix("deflate;")
    state = json.loads(zlib.decompress(base64.b64decode(packed)))
    assert f"&viewStateShareKey={views.KEY})" in note and state["searchFilter"] in unquote(note)
    (link,) = re.findall(r"\[Trainings in pictures\]\((.*?)\)", note)
    assert "searchFilter" not in link  # beside a filter of its own MLflow opens no view
    (drawn,) = [chart for chart in state["compareRunCharts"] if chart["type"] == "PARALLEL"]
    metrics = client.get_run(trained.run_id).data.metrics
    assert {"lanczos/lambda_max", "final/val_accuracy"} <= {*drawn["selectedMetrics"]} <= {*metrics}
    overview.bring_up(setting)
    assert json.loads(client.get_experiment(experiment).tags[views.TAG]) == view
    client.delete_experiment_tag(experiment, views.TAG)
    with monkeypatch.context() as older:
        older.setattr(mlflow, "__version__", "3.12.0")
        overview.bring_up(setting)
    tags = client.get_experiment(experiment).tags
    assert views.TAG not in tags and "in pictures" not in tags["mlflow.note.content"]
    (model,) = client.search_registered_models("name = 'tiny.sgd'")
    assert "All trainings" in (model.description or "")
    client.delete_run(trained.run_id)
    headlines.put(trained.run_id, logged(barrier=1.0))
