"""A probe along a training, on a real store: what is logged, stored, reused and refused."""

from __future__ import annotations

import json

import mlflow
import numpy as np
import pytest

import lsa
from lsa import project
from lsa.cli import app
from lsa.figures import draw
from lsa.landscape import grid
from lsa.probe import PROBES, Metric, Result, find, probe
from lsa.probes import surface
from lsa.reports import report
from lsa.runtime.errors import InputError
from lsa.studies import measure, partial, series, train
from lsa.tracking import registered, registry, runs
from lsa.training import schedules

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # MLflow's and SQLAlchemy's own
    pytest.mark.usefixtures("global_rng_untouched"),
]
OPTIONS = {"k": 1, "density_probes": 0, "split": "no"}


@pytest.fixture
def setting(workplace) -> project.Project:
    file = workplace / "projects" / "tiny.yaml"
    budget = "train: {epochs: 3, batch_size: 50, checkpoint_every: 2}"
    file.write_text(file.read_text().replace("train: {epochs: 2, batch_size: 50}", budget))
    return project.load("tiny")


@pytest.fixture
def final(setting) -> lsa.Checkpoint:
    return lsa.load(train.train(setting.recipe("sgd")).checkpoint)


def test_a_probe_follows_a_training(final):
    done = lsa.measure_trajectory("lanczos", final, reuse=True, **OPTIONS)
    client = mlflow.MlflowClient()
    found = client.get_run(done.run_id)
    assert found.info.run_name == "sgd·lanczos along·s0"
    assert found.data.tags["lsa.step"] == "trajectory.lanczos"
    assert found.data.tags["optimizer"] == "sgd" and found.data.params["k"] == "1"
    assert len(found.inputs.model_inputs) == 3
    history = client.get_metric_history(done.run_id, "trajectory.lanczos/lambda_max")
    assert [m.step for m in history] == [0, 2, 3]
    folder = mlflow.artifacts.download_artifacts(run_id=done.run_id)
    content = json.loads(open(f"{folder}/trajectory.json").read())
    assert open(f"{folder}/trajectory.png", "rb").read(4) == b"\x89PNG"
    assert content["probe"] == "lanczos" and content["epochs"] == [0, 2, 3]
    column = content["metrics"]["lambda_max"]
    assert column["value"] == [m.value for m in history] and column["unit"] == "loss"
    errors = client.get_metric_history(done.run_id, "trajectory.lanczos/lambda_max_se_data")
    assert column["standard_errors"]["data"] == [m.value for m in errors]
    assert content["threshold"] == {"value": 20.0, "formula": "2/η"}
    ratios = content["metrics"]["threshold_ratio"]
    assert ratios["value"] == pytest.approx([value / 20 for value in column["value"]])
    spread = [error / 20 for error in column["standard_errors"]["data"]]
    assert ratios["standard_errors"]["data"] == pytest.approx(spread)
    kept = [model for _, model in registered.trajectory(registered.key(final.model_id))]
    for i, model_id in enumerate(kept):  # against the probe on each by itself
        source = registry.fetch(f"models:/{model_id}")
        alone = measure.measure("lanczos", source, **OPTIONS)
        residual = alone["lambda_max_residual"].value
        residual += content["metrics"]["lambda_max_residual"]["value"][i]
        assert abs(alone["lambda_max"].value - column["value"][i]) <= residual
        evaluated = source.training.evaluate(source.theta)
        assert content["train_loss"][i] == pytest.approx(evaluated.loss)
    whole = runs.read(final.run_id).metrics
    assert content["val_accuracy"][-1] == whole["final/val_accuracy"]
    assert content["train_loss"][0] > content["train_loss"][-1]
    assert sum("subset" in note for note in content["notes"]) == 1  # said once for all epochs
    again = lsa.measure_trajectory("lanczos", final, reuse=True, **OPTIONS)
    assert again.reused and again.run_id == done.run_id
    assert not lsa.measure_trajectory("lanczos", final, reuse=True, **OPTIONS | {"k": 2}).reused


def test_a_surface_along_a_training_goes_on_where_it_was_interrupted(final, workplace, monkeypatch):
    measured, point, limit = [], grid.point, 30

    def counted(*given):
        if len(measured) == limit:
            raise KeyboardInterrupt
        measured.append(point(*given))
        return measured[-1]

    for module in (surface, grid):
        monkeypatch.setattr(module, "point", counted)
    with pytest.raises(KeyboardInterrupt):
        lsa.measure_trajectory("surface", final, points=5)
    limit = 10**6
    done = lsa.measure_trajectory("surface", final, points=5)
    assert done.run_id  # each point of the three epochs once, but the first checkpoint twice
    assert len(measured) == 3 * (25 + 1) + 1
    assert not list((workplace / partial.SCRATCH).iterdir())


def test_noise_is_followed_too_and_adam_has_no_threshold(setting):
    final = lsa.load(train.train(setting.recipe("adamw")).checkpoint)
    done = lsa.measure_trajectory("sgd_noise", final, k=1, probes=2)
    assert "during training (sgd_noise)" in report.report(setting).html  # reads what is stored
    content = runs.artifact(done.run_id, "trajectory.json")
    assert np.all(np.array(content["metrics"]["noise_ratio"]["value"]) > 0)
    assert content["threshold"] is None and "threshold_ratio" not in content["metrics"]
    assert any("preconditioned Hessian" in note for note in content["notes"])


def test_preconditioned_sharpness_stands_beside_the_threshold_of_its_epoch(setting):
    """Adam has a threshold of its own, which moves with the learning rate; and no P at first."""
    budget = setting.train.model_copy(
        update={"schedule": project.Named(name="cosine", warmup_epochs=1)}
    )
    recipe = setting.recipe("adamw").model_copy(update={"train": budget})
    final = lsa.load(train.train(recipe).checkpoint)
    done = lsa.measure_trajectory("preconditioned", final, k=1)
    content = runs.artifact(done.run_id, "trajectory.json")
    assert content["epochs"] == [0, 2, 3] and content["threshold"] is None
    rate = schedules.schedule("cosine", epochs=3, steps_per_epoch=4, warmup_epochs=1)
    # of the first step, where none is taken yet, then of the last step taken
    rates = [0.01 * rate(step) for step in (0, 7, 11)]
    column = {name: numbers["value"] for name, numbers in content["metrics"].items()}
    assert column["learning_rate"] == pytest.approx(rates)
    thresholds = [(2 - 0.01 * r) * 19 / r for r in rates]  # AdamW's default decay is 0.01
    assert column["stability_threshold"] == pytest.approx(thresholds)
    assert column["sharpness"][0] == "nan" and column["sharpness"][1] > 0
    ratio = column["sharpness"][2] / thresholds[2]
    assert column["threshold_ratio"][2] == pytest.approx(ratio)
    drawn = series.drawn(find("preconditioned"), content)
    assert list(drawn.curves) == [
        *("sharpness", "threshold_ratio", "batch_sharpness", "stability_threshold")
    ]
    (figure,) = draw.figures("trajectory", drawn, "title").values()
    assert len(figure.axes) == 3
    (line,) = (line for line in figure.axes[0].lines if line.get_linestyle() == "--")
    assert line.get_ydata() == pytest.approx(thresholds)


def test_a_number_that_is_not_finite_at_first_does_not_hide_the_last(final):
    @probe()
    def inverse(theta) -> Result:
        """Infinite at the first of its calls, when there is no other number yet."""
        calls.append(theta)
        first = len(calls) == 1
        later = {} if first else {"b": Metric(3.0)}
        return Result({"a": Metric(float("inf") if first else 2.0), **later})

    calls = []
    try:
        done = lsa.measure_trajectory("inverse", final)
    finally:
        del PROBES["inverse"]
    assert done["a"].value == 2
    found = runs.artifact(done.run_id, "trajectory.json")["metrics"]
    assert found["a"]["value"] == ["inf", 2, 2] and found["b"]["value"] == ["nan", 3, 3]


def test_what_cannot_be_followed_is_refused_in_one_line(workplace, final):
    with pytest.raises(InputError, match="takes two checkpoints"):
        lsa.measure_trajectory("interpolation", final)
    with pytest.raises(InputError, match="trains from the initial weights"):
        lsa.measure_trajectory("intrinsic_dim", final)
    file = workplace / "projects" / "tiny.yaml"
    file.write_text(file.read_text().replace("checkpoint_every: 2", "checkpoint_every: 0"))
    alone = lsa.load(train.train(project.load("tiny").recipe("sgd")).checkpoint)
    with pytest.raises(InputError, match=r"set train\.checkpoint_every") as caught:
        lsa.measure_trajectory("lanczos", alone, **OPTIONS)
    assert "\n" not in str(caught.value)


def test_the_command_line_follows_with_the_projects_options(workplace, final, capsys):
    file = workplace / "projects" / "tiny.yaml"
    file.write_text(file.read_text() + "trajectory: {lanczos: {k: 1, density_probes: 0}}\n")
    arguments = ["lanczos", "--project", "tiny", "--optimizer", "sgd", "--split", "no"]
    assert app.run([*arguments, "--epochs", "all"]) == 0
    shown = capsys.readouterr().out
    assert "trajectory.lanczos/lambda_max " in shown
    done = runs.read(shown.split()[-1])
    assert runs.read(done.run_id).tags["lsa.step"] == "trajectory.lanczos"
    wanted = {"k": "1", "density_probes": "0", "split": "no"}
    assert wanted.items() <= done.params.items()
    assert app.run(["intrinsic_dim", "--project", "tiny", "--optimizer", "sgd", "--epochs", "all"])
    assert "epochs" in capsys.readouterr().err  # its own option, a number


@pytest.mark.parametrize(
    ("schedule", "options", "expected"),
    [
        ({"name": "constant"}, {"lr": 0.1}, {"value": 20.0, "formula": "2/η"}),
        ({"name": "cosine"}, {"lr": 0.1}, "learning rate changes"),
        ({"name": "constant", "warmup_epochs": 1}, {"lr": 0.1}, "learning rate changes"),
        ({"name": "constant"}, {"lr": 0.1, "maximize": True}, "preconditioned Hessian"),
    ],
)
def test_a_threshold_is_given_only_where_it_holds(setting, schedule, options, expected):
    budget = setting.train.model_copy(update={"schedule": project.Named(**schedule)})
    rule = project.Named(name="SGD", **options)
    recipe = setting.recipe("sgd").model_copy(update={"train": budget, "rule": rule})
    found, notes = series.threshold(recipe, ["lambda_max"])
    if isinstance(expected, str):
        assert found is None and expected in notes[0]
    else:
        assert (found, notes) == (expected, [])
    assert series.threshold(recipe, ["trace"]) == (None, [])  # nothing to hold against it
