"""Tracked steps against a real MLflow store: what is logged, registered, found and reused."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from processes import command

import lsa
from lsa import probe as probes
from lsa import project
from lsa.landscape import flatten
from lsa.probe import PROBES, Metric, Result, probe
from lsa.runtime import heap, provenance
from lsa.runtime.errors import InputError
from lsa.studies import load, measure, steps, train
from lsa.tracking import recording, results, runs, store
from lsa.training import train as training

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # MLflow's and SQLAlchemy's own
    pytest.mark.usefixtures("global_rng_untouched"),
]


def run(run_id: str):
    return mlflow.MlflowClient().get_run(run_id)


def test_a_checkpoint_is_found_by_every_address(trained):
    mlflow.MlflowClient().set_registered_model_alias("tiny.sgd", "best", "1")
    model_id = run(trained.run_id).data.tags["lsa.model_id"]
    references = [
        trained.run_id, "models:/tiny.sgd/1", "models:/tiny.sgd@best", f"models:/{model_id}",
    ]  # fmt: skip
    thetas = [lsa.load(reference).theta for reference in references]
    thetas.append(lsa.load(optimizer="sgd", project="tiny").theta)
    assert all(torch.equal(theta, thetas[0]) for theta in thetas)
    found = lsa.load(trained.run_id)
    accuracy = 1 - found.validation.evaluate(found.theta).error
    assert accuracy == pytest.approx(trained["val_accuracy"].value)
    assert found.landscape.n_samples == 64 and found.optimizer_state["param_groups"]
    initial = training.network(found.recipe, found.data)
    assert torch.equal(found.theta_init.cpu(), flatten(initial))


def test_the_optimizer_of_a_checkpoint_steps_on_as_torchs_own(workplace):
    trained = train.train(project.load("tiny").recipe("adamw"))
    found = lsa.load(trained.checkpoint, device="cpu")
    kept = found.optimizer
    assert (kept.name, kept.batch_size) == ("AdamW", 50)
    assert {int(state["step"]) for state in kept.optimizer.state.values()} == {8}  # 2 epochs of 4
    model = training.network(found.recipe, found.data)
    model.load_state_dict(dict(found.weights))
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.load_state_dict(found.optimizer_state)
    gradient = found.training.gradient(found.theta)
    for p, part in zip(
        model.parameters(), found.training.unflatten(gradient).values(), strict=True
    ):
        p.grad = part.clone()
    optimizer.step()
    moved = flatten(model) - found.theta
    torch.testing.assert_close(kept.update(found.theta, gradient), moved, rtol=0, atol=1e-7)
    assert moved.abs().median() > 1e-3  # far above what is let pass


def test_a_checkpoint_without_the_optimizers_state_is_refused_in_one_line(trained):
    bare = dataclasses.replace(lsa.load(trained.run_id), optimizer_state={})
    with pytest.raises(InputError, match="keeps no state of SGD") as caught:
        measure.measure("preconditioned", bare)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reference": "nope"}, "no checkpoint 'nope'"),
        ({"reference": "models:/tiny.sgd/9"}, "no checkpoint at models:/tiny.sgd/9"),
        ({"optimizer": "adamw", "project": "tiny"}, "make one with: lsa train"),
        ({"optimizer": "lion", "project": "tiny"}, "unknown optimizer 'lion'"),
        ({"project": "tiny"}, "no checkpoint is named"),
        ({"reference": "x", "optimizer": "sgd"}, "give one"),
        ({"reference": "x' OR '1'='1"}, "holds a quote"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(trained, arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        lsa.load(**arguments)
    assert "\n" not in str(caught.value)


def test_a_probe_logs_on_its_run_and_on_the_checkpoint(trained):
    source = lsa.load(trained.run_id)
    before = source.theta.clone()
    done = measure.measure("lanczos", source, k=2)
    found = run(done.run_id)
    assert found.data.params["k"] == "2" and found.data.params["n_samples"] == "64"
    assert found.data.tags["lsa.chunk"] == str(source.landscape.chunk)
    assert int(found.data.tags["lsa.graph_memory"]) > 0
    assert found.data.tags["lsa.layout"] == "channels_last"
    assert found.data.metrics["lanczos/converged"] == 1
    assert found.data.metrics["lanczos/lambda_max_se_data"] > 0
    assert any("subset" in v for k, v in found.data.tags.items() if k.startswith("lsa.note"))
    model = mlflow.get_logged_model(source.model_id)
    known = {m.key for m in model.metrics}
    assert {"lanczos/lambda_max", "lanczos/lambda_max_se_data"} <= known
    assert "lanczos/products" not in known  # a row of the UI's table holds the headline only
    assert [i.model_id for i in found.inputs.model_inputs] == [source.model_id]
    folder = mlflow.artifacts.download_artifacts(run_id=done.run_id)
    content = json.loads(open(f"{folder}/lanczos.json").read())
    assert content["metrics"]["lambda_max"]["value"] == found.data.metrics["lanczos/lambda_max"]
    assert np.load(f"{folder}/eigenvectors.npy").shape == (len(before), 3)
    assert open(f"{folder}/lanczos.png", "rb").read(4) == b"\x89PNG"
    assert torch.equal(before, source.theta)


def test_a_bad_environment_is_refused_before_a_run_is_made(trained, monkeypatch):
    monkeypatch.setenv("LSA_GRAPH_MEMORY", "much")
    with pytest.raises(InputError, match="LSA_GRAPH_MEMORY='much' is no whole number"):
        lsa.measure("lanczos", lsa.load(trained.run_id), k=1)
    assert not lanczos_runs()


def lanczos_runs() -> list:
    named = "tags.`lsa.step` = 'lanczos'"
    return mlflow.search_runs(
        search_all_experiments=True, filter_string=named, output_format="list"
    )


def test_a_step_leaves_the_c_library_as_it_is(trained, monkeypatch):
    def touched() -> None:
        raise AssertionError("only a process of lsa's own is set, at its start")

    monkeypatch.setattr(heap, "_glibc", touched)
    lsa.measure("lanczos", lsa.load(trained.run_id), k=1)


def test_a_notebook_shows_checkpoints_and_studies_as_tables(trained):
    source = lsa.load(trained.run_id)
    assert "mlp" in repr(source) and trained.run_id in repr(source) and "tensor" not in repr(source)
    page = source._repr_html_()
    assert f"<th scope='row'>run</th><td>{trained.run_id}</td>" in page
    with lsa.study("tiny") as running:
        handle = running.step("train", optimizer="sgd")
        assert "<td>waiting</td>" in running._repr_html_() and handle._repr_html_() is None
        assert handle.run_id == trained.run_id
    row = f"<th scope='row'>train sgd seed 0</th><td>reused</td><td>{trained.run_id}</td>"
    assert row in running._repr_html_()
    assert "val_loss" in str(handle._repr_html_())


def test_a_notebook_shows_a_step_with_the_figure_of_its_run(trained):
    with lsa.study("tiny") as running:
        handle = running.step("lanczos", running.step("train", optimizer="sgd"), density_steps=9)
        assert "density" in handle.result.curves and not handle.result.arrays
    shown = str(handle._repr_html_())
    assert "<th scope='row'>lambda_max</th>" in shown and "data:image/png" in shown
    assert "<th scope='row'>lambda_max</th>" in str(handle.result._repr_html_())


def test_steps_with_the_same_key_are_reused(trained):
    recipe = project.load("tiny").recipe("sgd")
    again = train.train(recipe, reuse=True)
    assert again.reused and again.run_id == trained.run_id
    source = lsa.load(trained.run_id)
    first = measure.measure("lanczos", source, k=1, reuse=True)
    assert measure.measure("lanczos", source, k=1, reuse=True).run_id == first.run_id
    assert not measure.measure("lanczos", source, k=2, reuse=True).reused
    assert not train.train(project.load("tiny").recipe("sgd", 1), reuse=True).reused


BROKEN: list[Any] = [[], {}, {"metrics": 3}, {"metrics": {"x": 1}, "curves": {}}, "[" * 99]
BROKEN += [{"metrics": {}, "curves": {}, "arrays": {"nowhere": [3]}}]


def broken(run_id: str, content: Any, name: str = "lanczos.json") -> None:
    """Give a run an artifact that no step has written."""
    text = content if isinstance(content, str) else json.dumps(content)
    mlflow.MlflowClient().log_text(run_id, text, name)


def test_a_finished_step_whose_result_was_altered_is_refused_and_measured_again(trained, caplog):
    source = lsa.load(trained.run_id)
    done = lsa.measure("lanczos", source, k=2, density_probes=0)
    for content in BROKEN:
        broken(done.run_id, content)
        with pytest.raises(runs.Broken, match=done.run_id) as caught:
            results.read(done.run_id)
        assert "\n" not in str(caught.value)
    again = lsa.measure("lanczos", source, k=2, density_probes=0, reuse=True)
    assert not again.reused and again["lambda_max"] == done["lambda_max"]
    assert f"{done.run_id} " in caplog.text and "does not count" in caplog.text


def strangers(key: str, step: str) -> list[str]:
    """Finished runs of somebody else, newer than ours, that claim to be a step's."""
    client, made = mlflow.MlflowClient(), []
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    for content in [None, *BROKEN]:
        tags = {"lsa.key": key, "lsa.step": step, "project": "tiny"}
        made.append(client.create_run(experiment.experiment_id, tags=tags).info.run_id)
        for name in ("lanczos.json", "trajectory.json"):
            if content is not None:
                broken(made[-1], content, name)
        client.set_terminated(made[-1])
    return made


def test_a_strangers_run_with_the_key_of_a_step_does_not_stand_for_it(trained):
    key = runs.read(trained.run_id).tags["lsa.key"]
    strangers(key, "train")
    again = train.train(project.load("tiny").recipe("sgd"), reuse=True)
    assert again.reused and again.run_id == trained.run_id
    source, options = lsa.load(trained.run_id), {"k": 2, "density_probes": 0}
    key = steps.probe_key(
        probes.find("lanczos"),
        project.resolve(probes.find("lanczos"), options, "options"),
        [source.model_id],
        source.recipe.landscape.samples,
    )
    strangers(key, "lanczos")
    strangers(key, "")
    measured = lsa.measure("lanczos", source, reuse=True, **options)
    assert not measured.reused
    strangers(key, "lanczos")
    again = lsa.measure("lanczos", source, reuse=True, **options)
    assert again.reused and again.run_id == measured.run_id
    assert again["lambda_max"].value == measured["lambda_max"].value


def test_a_strangers_run_that_comes_meanwhile_does_not_end_ours(trained, monkeypatch):
    source, made, call = lsa.load(trained.run_id), [], measure.call_probe

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        (running,) = mlflow.search_runs(
            search_all_experiments=True,
            filter_string="attributes.status = 'RUNNING'",
            output_format="list",
        )
        made.extend(strangers(running.data.tags["lsa.key"], "lanczos"))
        return call(*arguments, **options)

    monkeypatch.setattr(measure, "call_probe", meanwhile)
    done = lsa.measure("lanczos", source, k=2, density_probes=0)
    assert made and done.run_id not in made
    assert runs.read(done.run_id).status == "FINISHED"


def test_identical_seeds_give_identical_numbers(trained):
    source = lsa.load(trained.run_id)
    a, b = (measure.measure("lanczos", source, k=2).metrics for _ in range(2))
    assert a == b


def test_numbers_that_are_not_finite_are_tags_not_metrics(trained):
    @probe()
    def infinite(theta) -> Result:
        """A number that diverged."""
        return Result({"a": Metric(float("inf")), "b": Metric(1.0)})

    try:
        done = measure.measure("infinite", lsa.load(trained.run_id))
    finally:
        del PROBES["infinite"]
    found = run(done.run_id)
    assert "infinite/a" not in found.data.metrics and found.data.metrics["infinite/b"] == 1
    assert found.data.tags["lsa.not_finite.infinite/a"] == "inf"


def test_a_damaged_or_foreign_checkpoint_is_refused(trained, tmp_path):
    from lsa.tracking import checkpoint

    source = lsa.load(trained.run_id)
    folder = tmp_path / "copy"
    folder.mkdir()
    checkpoint.save(source, folder)
    (folder / "weights.safetensors").write_bytes(b"cut off")
    with pytest.raises(InputError, match="no whole lsa checkpoint"):
        checkpoint.read(folder)


def test_a_pair_probe_links_both_checkpoints(trained):
    train.train(project.load("tiny").recipe("adamw"))
    a, b = (lsa.load(project="tiny", optimizer=name) for name in ("sgd", "adamw"))
    done = lsa.measure("interpolation", a, b, points=5)
    tags = runs.read(done.run_id).tags
    assert (
        tags["lsa.input.a"],
        tags["lsa.input.b"],
    ) == (a.model_id, b.model_id)
    on_model = {m.key: m.value for m in mlflow.get_logged_model(a.model_id).metrics}
    on_run = runs.read(a.run_id).metrics
    assert on_model["interpolation/barrier"] == on_run["interpolation/barrier"]
    assert on_run["interpolation/barrier"] == done["barrier"].value
    assert "interpolation/barrier_se_data" in on_run
    assert not {"interpolation/alpha_min", "interpolation/distance"} & {*on_model, *on_run}
    folder = Path(mlflow.artifacts.download_artifacts(run_id=done.run_id))
    with np.load(folder / "interp_data.npz") as stored:
        assert stored["alpha"].tolist() == [-0.5, 0, 0.5, 1, 1.5] and len(stored["train_loss"]) == 5
    assert {"interpolation.png", "interpolation.json"} <= {path.name for path in folder.iterdir()}


def test_a_number_that_is_not_finite_comes_back_as_it_was(workplace, trained):
    done = lsa.measure("intrinsic_dim", lsa.load(trained.run_id), largest=8, epochs=1, subspaces=2)
    assert done["d90"].value == float("inf")
    assert runs.read(done.run_id).tags["lsa.not_finite.intrinsic_dim/d90"] == "inf"


def test_the_default_store_is_where_mlflow_ui_looks(workplace):
    assert store.uri().endswith("mlflow.db")


def test_runs_whose_process_died_are_ended(workplace):
    with recording.run("old", experiment="tiny", tags={"project": "tiny"}, device="cpu") as old:
        pass
    client = mlflow.MlflowClient()
    client.update_run(old.id, status="RUNNING")
    assert runs.end_stale("project", "tiny") == []  # this very process holds it
    pid = provenance.machine("cpu")["lsa.process"].partition("@")[0]
    client.set_tag(old.id, "lsa.process", f"{pid}@1.00")
    assert runs.end_stale("project", "other") == []
    assert runs.end_stale("project", "tiny") == ["old"]
    assert run(old.id).info.status == "KILLED" and "died" in run(old.id).data.tags["lsa.error"]


def test_an_error_that_is_no_ones_input_leaves_its_traceback(workplace):
    with (
        pytest.raises(KeyError),
        recording.run("bad", experiment="tiny", tags={}, device="cpu") as opened,
    ):
        raise KeyError("missing")
    assert "KeyError" in mlflow.artifacts.load_text(f"runs:/{opened.id}/traceback.txt")


def test_processes_may_open_a_new_store_at_once(workplace):
    code = "from lsa.tracking import store; store.client().search_experiments()"
    there = {
        "code": code,
        "env": os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{workplace}/new.db"},
    }
    with command(**there) as first, command(**there) as second:
        for process in (first, second):
            process.join(120)
            assert process.exitcode == 0


def test_two_that_log_a_new_dataset_at_once_both_do(trained, monkeypatch):
    """MLflow looks whether it is there and then adds it; a database refuses the second."""
    log_inputs, refused = MlflowClient.log_inputs, []

    def once(self, *args, **kwargs):
        if not refused:
            refused.append(1)
            raise MlflowException(
                "(sqlite3.IntegrityError) UNIQUE constraint failed: datasets.name"
            )
        return log_inputs(self, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, "log_inputs", once)
    checkpoint = load.load(trained.run_id)
    done = measure.measure("perturbation", checkpoint, points=5)
    run = store.client().get_run(done.run_id)
    assert refused and run.info.status == "FINISHED" and run.inputs.dataset_inputs
