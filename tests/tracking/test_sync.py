"""What was measured while the store was away is delivered, once and as it would have been."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from plug import runs, trained_without

import lsa
from lsa import project, step, study
from lsa.cli import app
from lsa.studies import measure, train
from lsa.tracking import registered, spool, store, sync

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # MLflow's and SQLAlchemy's own
    pytest.mark.usefixtures("global_rng_untouched"),
]


def contents(run) -> tuple:
    """What a run holds, but for when and where it was made."""
    timings = ("train/seconds",)
    metrics = {k: v for k, v in run.data.metrics.items() if k not in timings}
    files = {file.path for file in mlflow.artifacts.list_artifacts(run_id=run.info.run_id)}
    notes = {k: v for k, v in run.data.tags.items() if k.startswith(("lsa.note", "lsa.not"))}
    return run.info.status, run.info.run_name, metrics, run.data.params, files, notes


def stranger(key: str, step: str, content: str | None) -> None:
    """A finished run of somebody else that claims to be a step's."""
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("tiny") or client.get_experiment("0")
    tags = {"lsa.key": key, "lsa.step": step, "project": "tiny"}
    made = client.create_run(experiment.experiment_id, tags=tags).info.run_id
    if content is not None:
        client.log_text(made, content, f"{step}.json")
    client.set_terminated(made)


def test_no_answer_is_told_from_a_refusal(workplace, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(MlflowException) as caught:
        mlflow.MlflowClient("http://127.0.0.1:9").search_experiments()
    assert store.away(caught.value)
    assert store.explained(caught.value).endswith("does not answer (Connection refused)")
    with pytest.raises(MlflowException) as caught:
        mlflow.MlflowClient().get_run("0" * 32)
    assert not store.away(caught.value) and "refuses" in store.explained(caught.value)


def test_a_probe_measured_while_the_store_is_away_is_delivered_as_it_would_have_been(trained, plug):
    source = lsa.load(trained.run_id)
    measure.measure("lanczos", source, k=2)
    (expected,) = runs(**{"lsa.step": "lanczos"})
    mlflow.MlflowClient().delete_run(expected.info.run_id)
    plug.pull()
    with pytest.raises(spool.NotLogged, match="sgd·lanczos·s0 is measured, not logged: ") as caught:
        measure.measure("lanczos", source, k=2)
    assert "\n" not in str(caught.value) and "deliver it with: lsa sync" in str(caught.value)
    with pytest.raises(spool.NotLogged):  # it is not measured again
        measure.measure("lanczos", source, k=2, reuse=True)
    ((name, end),) = sync.sync()
    assert name == "sgd·lanczos·s0" and end.endswith("does not answer (Connection refused)")
    plug.put()
    ((_, end),) = sync.sync()
    (found,) = runs(**{"lsa.step": "lanczos"})
    assert end == f"run {found.info.run_id}" and contents(found) == contents(expected)
    (measured,) = mlflow.MlflowClient().get_run(found.info.run_id).inputs.model_inputs
    assert measured.model_id == source.model_id
    assert found.info.end_time >= found.info.start_time
    assert spool.entries() == [] and list(sync.sync()) == []


def test_headline_numbers_delivered_late_stand_on_the_trainings_too(trained, plug):
    client = mlflow.MlflowClient()
    other = train.train(project.load("tiny").recipe("adamw"))
    sources = [lsa.load(done.run_id) for done in (trained, other)]
    client.log_metric(other.run_id, "interpolation/barrier", 1e3)  # of a worse pair, known before
    plug.pull()
    with pytest.raises(spool.NotLogged):
        measure.measure("lanczos", sources[0], k=2)
    with pytest.raises(spool.NotLogged):
        measure.measure("interpolation", *sources, points=5)
    plug.put()
    assert not {"lanczos/lambda_max", "interpolation/barrier"} & set(numbers_of(trained.run_id))
    assert [end[:4] for _, end in sync.sync()] == ["run ", "run "]
    (alone,), (pair,) = (runs(**{"lsa.step": name}) for name in ("lanczos", "interpolation"))
    first, second = (numbers_of(done.run_id) for done in (trained, other))
    names = [
        "lambda_max",
        "lambda_max_se_data",
        "lambda_min",
        "trace",
        "trace_se_probes",
        "converged",
    ]
    for name in (f"lanczos/{name}" for name in names):
        assert first[name] == alone.data.metrics[name]
    assert first["interpolation/barrier"] == pair.data.metrics["interpolation/barrier"]
    assert second["interpolation/barrier"] == 1e3


def numbers_of(run_id: str) -> dict[str, float]:
    return mlflow.MlflowClient().get_run(run_id).data.metrics


def test_a_result_kept_for_one_store_outlives_the_same_step_for_another(workplace, new_store, plug):
    recipe = trained_without(plug)
    (kept,), here = spool.entries(), store.addresses()
    shutil.copy(new_store, "other.db")
    store.use(*[f"sqlite:///{workplace}/other.db"] * 2)
    assert not train.train(recipe, reuse=True).reused
    assert spool.entries() == [kept] and len(runs()) == 1
    ((_, end),) = sync.sync()
    assert end == f"stays: it is for the store {here[0]}"
    store.use(*here)
    ((_, end),) = sync.sync()
    assert end.startswith("run ") and len(runs()) == 1


def test_what_waits_for_another_registry_is_not_registered_in_this_one(workplace, plug):
    own, other = store.addresses()[0], f"sqlite:///{workplace}/models.db"
    store.use(own, other)
    trained_without(plug)
    store.use(own, own)
    ((_, end),) = sync.sync()
    assert end == f"stays: it is for the registry {other}; set MLFLOW_REGISTRY_URI"
    assert store.client().search_model_versions("") == []
    store.use(own, other)
    ((_, end),) = sync.sync()
    assert end.startswith("run ") and len(store.client().search_model_versions("")) == 1


def test_what_another_client_logged_meanwhile_is_not_logged_again(trained, plug, monkeypatch):
    source = lsa.load(trained.run_id)
    first = measure.measure("perturbation", source, points=5)
    call_probe = measure.call_probe
    monkeypatch.setattr(
        measure, "call_probe", lambda *of, **more: (plug.put(), call_probe(*of, **more))[1]
    )
    plug.pull()  # when it begins; back when it has measured
    again = measure.measure("perturbation", source, points=5, reuse=True)
    assert again.run_id == first.run_id and len(runs(**{"lsa.step": "perturbation"})) == 1
    assert spool.entries() == []


def test_a_strangers_run_with_our_key_does_not_take_the_place_of_what_is_kept(trained, plug):
    source = lsa.load(trained.run_id)
    plug.pull()
    with pytest.raises(spool.NotLogged):
        measure.measure("perturbation", source, points=5)
    with pytest.raises(spool.NotLogged):
        train.train(project.load("tiny").recipe("adamw"))
    plug.put()
    for path in spool.entries():
        tags = spool.read(path).content.tags
        stranger(tags["lsa.key"], tags["lsa.step"], "no JSON")
        stranger(tags["lsa.key"], tags["lsa.step"], None)
    ends = [end.split()[-1] for _, end in sync.sync()]
    ours = [run.info.run_id for run in runs() if "lsa.entry" in run.data.tags]
    assert len(ends) == 2 and set(ends) <= set(ours) and spool.entries() == []
    assert measure.measure("perturbation", source, points=5, reuse=True).run_id in ends


@pytest.mark.parametrize("call", ["create_run", "log_batch", "set_terminated"])
def test_a_login_that_may_not_write_leaves_nothing_in_the_spool_and_is_told(
    trained, monkeypatch, call
):
    source = lsa.load(trained.run_id)
    refusal = "API request failed with error code 403 != 200. Response body: 'Permission denied'"

    def refused(*_: object, **__: object) -> None:
        raise MlflowException(refusal)

    monkeypatch.setattr(mlflow.MlflowClient, call, refused)
    if call == "set_terminated":  # it is measured by then: kept
        with pytest.raises(spool.NotLogged, match="does not let this login write there"):
            measure.measure("perturbation", source, points=5)
        assert len(spool.entries()) == 1
        return
    with pytest.raises(MlflowException, match="Permission denied"):
        measure.measure("perturbation", source, points=5)
    assert list(spool.folder().iterdir()) == []


def test_a_training_while_the_store_is_away_keeps_its_checkpoints(workplace, plug):
    file = workplace / "projects" / "tiny.yaml"
    budget = "train: {epochs: 5, batch_size: 50, checkpoint_every: 2}"
    file.write_text(file.read_text().replace("train: {epochs: 2, batch_size: 50}", budget))
    recipe = trained_without(plug, "sgd·train·s0 is measured, not logged")
    done = train.train(recipe)  # delivered, not trained again
    assert done.reused and done.checkpoint == "models:/tiny.sgd/1"
    key = mlflow.MlflowClient().get_run(done.run_id).data.tags["lsa.key"]
    assert [epoch for epoch, _ in registered.trajectory(key)] == [0, 2, 4, 5]
    assert len(mlflow.MlflowClient().get_metric_history(done.run_id, "val/loss")) == 5
    again = train.train(recipe)
    assert again["train_loss"].value == done["train_loss"].value
    assert lsa.load(done.checkpoint).theta.equal(lsa.load(again.checkpoint).theta)


@pytest.mark.slow
@pytest.mark.parametrize("answered", [False, True])
def test_a_delivery_cut_short_at_every_call_ends_as_one_run(workplace, plug, answered):
    """Whether the store did what it was asked last, or not: neither is known to who asked."""
    trained_without(plug)
    attempts = 0
    while spool.entries():
        attempts += 1
        assert attempts < 80
        plug.fail_at(attempts, answered=answered)
        list(sync.sync())
    plug.put()
    assert attempts > 15  # calls that it takes
    (found,) = runs()
    assert found.info.status == "FINISHED" and found.data.params["optimizer"] == "sgd"
    (version,) = mlflow.MlflowClient().search_model_versions("")
    assert found.data.tags["lsa.checkpoint"] == f"models:/{version.name}/{version.version}"
    assert len(mlflow.MlflowClient().get_metric_history(found.info.run_id, "val/loss")) == 2
    models = mlflow.MlflowClient().search_logged_models(store.experiments())
    assert [m.model_id for m in models if "lsa.key" in m.tags] == [found.data.tags["lsa.model_id"]]


def test_a_study_goes_on_where_it_can_and_is_finished_later(workplace, plug):
    with pytest.raises(spool.NotLogged, match="2 of the study's 5 steps are measured, not logged"):
        with study("tiny") as running:
            trained = step("train", optimizer="sgd")
            _ = step("lanczos", trained, k=1).run_id
            plug.pull()
            step("perturbation", trained, points=5)  # of the checkpoint that it has
            other = step("train", optimizer="adamw")
            step("lanczos", other, k=1)
    assert [h.state for h in running.handles] == ["done", "done", "unlogged", "unlogged", "skipped"]
    assert running.handles[4].error == "not run: train adamw seed 0 is not logged"
    plug.put()
    assert all(end.startswith("run ") for _, end in sync.sync())
    (parent,) = runs(**{"lsa.step": "study"})  # nobody could end it, so it is as of a dead process
    mlflow.MlflowClient().set_tag(parent.info.run_id, "lsa.process", "1@1.00")
    with study("tiny") as running:
        trained, other = (step("train", optimizer=name) for name in ("sgd", "adamw"))
        step("perturbation", trained, points=5)
        for one in (trained, other):
            step("lanczos", one, k=1)
    assert [h.state for h in running.handles] == ["reused"] * 4 + ["done"]
    (parent,) = runs(**{"lsa.step": "study"})
    assert parent.info.status == "FINISHED"
    assert len(runs(**{"mlflow.parentRunId": parent.info.run_id})) == 3
    assert len(runs(**{"lsa.study": parent.info.run_id})) == 2  # trainings stand beside it


def test_the_command_line_says_so_in_one_line_with_its_own_code(workplace, plug, capsys):
    store.client()
    arguments = ["train", "--project", "tiny", "--optimizer", "sgd", "--epochs", "1"]
    plug.pull()
    assert app.run(arguments) == 75
    assert app.run(["sync"]) == 75
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("lsa: sgd·train·s0 is measured, not logged: the store sqlite:")
    assert second == "lsa: 1 of 1 entries stay in .lsa/spool"
    assert app.run(["checkpoints"]) == 2
    assert capsys.readouterr().err.endswith("does not answer (Connection refused)\n")
    plug.put()
    assert app.run(["sync"]) == 0 and app.run(["sync"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("sgd·train·s0: run ") and told[1] == "nothing waits in .lsa/spool"


# What MLflow sends again where the answer to the first request was lost, though it was done.
CHANGES = (
    "create_experiment", "create_run", "create_logged_model", "create_registered_model",
    "create_model_version", "log_batch", "log_inputs", "log_outputs", "log_artifact",
    "log_model_artifacts", "set_logged_model_tags", "set_terminated",
)  # fmt: skip


def test_what_is_sent_twice_is_there_once(workplace, monkeypatch):
    twice = set()

    def repeated(name: str) -> Callable:
        method = getattr(mlflow.MlflowClient, name)

        def call(*arguments: object, **options: object) -> object:
            if name not in twice:
                twice.add(name)
                method(*arguments, **options)  # whose answer is lost
            return method(*arguments, **options)

        return call

    monkeypatch.setattr("lsa.tracking.run.is_served", lambda uri: True)  # else nothing is lost
    for name in CHANGES:
        monkeypatch.setattr(mlflow.MlflowClient, name, repeated(name))
    trained = train.train(project.load("tiny").recipe("sgd"))
    measure.measure("lanczos", lsa.load(trained.run_id), k=1, density_steps=5)
    assert twice == set(CHANGES)
    steps = [(run.data.tags["lsa.step"], run.info.status) for run in runs()]
    assert sorted(steps) == [("lanczos", "FINISHED"), ("train", "FINISHED")]
    client = mlflow.MlflowClient()
    (experiment,) = {run.info.experiment_id for run in runs()}
    models = client.search_logged_models([experiment])
    assert [(m.tags["epoch"], str(m.status)) for m in models] == [("2", "READY")]
    assert len(client.search_model_versions("")) == 1
    history = client.get_metric_history(trained.run_id, "val/loss")
    assert sorted({m.step for m in history}) == [1, 2]
    assert spool.entries() == []
