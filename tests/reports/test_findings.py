"""Findings rebuilt from a real store, over seeds whose values are known."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import numpy as np
import pytest

from lsa import project
from lsa.cli import app
from lsa.reports.artifacts import Trajectory
from lsa.reports.findings import Finding, findings, pair_findings
from lsa.reports.measurements import Measurement, measured
from lsa.runtime.errors import InputError
from lsa.tracking.runs import Done

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's and SQLAlchemy's own


def log(step: str, optimizer: str, seed: int, metrics: dict[str, float], **params: object) -> str:
    """A finished run as `lsa` leaves it; its id."""
    tags = {"lsa.step": step, "project": "tiny", "optimizer": optimizer, "seed": str(seed)}
    with mlflow.start_run(tags=tags) as run:
        mlflow.log_metrics(metrics)
        mlflow.log_params({"optimizer": optimizer, "seed": seed, **params})
    return run.info.run_id


@pytest.fixture
def seven_seeds(workplace):
    """sgd's λ_max is twice adamw's at every seed; the accuracies are equal on average."""
    file = workplace / "projects" / "tiny.yaml"
    file.write_text(file.read_text().replace("seeds: [0]", "seeds: [0, 1, 2, 3, 4, 5, 6]"))
    for seed in range(7):
        for optimizer, factor in (("sgd", 2.0), ("adamw", 1.0)):
            accuracy = 0.9 + 0.01 * (-1) ** seed * (factor - 1.5)
            final = {"final/val_accuracy": accuracy, "final/train_loss": 0.1}
            sharpness = {"lanczos/lambda_max": factor * (5 + seed)}
            checkpoint = log("train", optimizer, seed, final)
            log("lanczos", optimizer, seed, sharpness, k=2, checkpoint=checkpoint)
    return project.load("tiny")


def test_what_every_seed_shows_is_established_and_chance_is_not(seven_seeds, capsys):
    found = {f.metric: f.comparison for f in findings(measured(seven_seeds))}
    sharpness, accuracy = found["lanczos/lambda_max"], found["final/val_accuracy"]
    assert sharpness.established and sharpness.effect == pytest.approx(2)
    assert (sharpness.a, sharpness.b) == ("sgd", "adamw")
    assert sharpness.seeds == tuple(range(7))
    assert accuracy.scale == "difference" and not accuracy.established
    assert app.run(["compare", "tiny"]) == 0
    out = capsys.readouterr().out
    assert "sgd/adamw = 2" in out and "fewer than 6 seeds; there are 7." in out
    assert app.run(["compare", "tiny", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["seeds_needed"] == 6 and told["seeds"] == list(range(7)) and told["pairs"] == []
    assert told["optimizers"] == ["sgd", "adamw"]
    (one,) = [one for one in told["findings"] if one["metric"] == "lanczos/lambda_max"]
    assert one["established"] and one["effect"] == pytest.approx(2) and one["doubt"] == ""


def test_a_single_optimizer_is_told_what_lacks(trained, capsys):
    assert app.run(["compare", "tiny"]) == 0
    assert capsys.readouterr().out == (
        "nothing to compare yet: project tiny lacks trainings of adamw; run lsa study tiny\n"
    )


def test_a_project_of_one_optimizer_is_told_to_have_another(trained, capsys):
    file = Path("projects/tiny.yaml")
    lines = [line for line in file.read_text().splitlines() if "adamw" not in line]
    file.write_text("\n".join(lines))
    assert app.run(["compare", "tiny"]) == 0
    assert "has one optimizer; add another to its file, then run" in capsys.readouterr().out


def twice() -> list[Measurement]:
    """sgd's λ_max is twice adamw's at every seed, their train losses are equal."""
    return [
        Measurement(step, name, seed, Done("", numbers, {}, {}))
        for name, factor in (("sgd", 2.0), ("adamw", 1.0))
        for seed in range(7)
        for step, numbers in (
            ("train", {"final/train_loss": 0.1}),
            ("lanczos", {"lanczos/lambda_max": factor * (5 + seed)}),
        )
    ]


def sharpness_of(runs: list[Measurement], trajectories: list[Trajectory]) -> Finding:
    (found,) = [f for f in findings(runs, trajectories) if f.metric == "lanczos/lambda_max"]
    return found


def test_curvature_that_differs_at_the_last_epoch_only_is_no_finding():
    found = sharpness_of(twice(), [])
    assert found.comparison.established and not found.established
    assert found.verdict == "not established: larger for sgd at the last epoch only"
    assert "the ratio of their train losses is the same at every seed" in found.sentence


def test_curvature_of_few_seeds_is_not_matched():
    found = sharpness_of([m for m in twice() if m.seed < 3], [])
    assert "no equal-loss comparison: no trajectories, and fewer than 6 seeds" in found.sentence


def trajectory(name: str, seed: int, last: float, scale: float) -> Trajectory:
    loss = np.geomspace(2, last, 9)
    values = {"lambda_max": (scale * np.sqrt(loss) * (5 + seed)).tolist()}
    return Trajectory("lanczos", name, seed, list(range(9)), loss.tolist(), values)


@pytest.mark.parametrize(
    ("scale", "verdict"),
    [
        (2.0, "established: larger for sgd"),
        (1.0, "not established: larger for sgd at the last epoch only"),
        (
            0.5,
            "not established: larger for sgd at the last epoch, larger for adamw at equal train "
            "loss",
        ),
    ],
)
def test_curvature_is_compared_along_the_trajectories(scale, verdict):
    trajectories = [trajectory("sgd", s, 0.5, scale) for s in range(7)]
    trajectories += [trajectory("adamw", s, 0.1, 1.0) for s in range(7)]
    sharpness = sharpness_of(twice(), trajectories)
    assert sharpness.matched is not None
    assert sharpness.matched.effect == pytest.approx(scale) and sharpness.verdict == verdict
    assert sharpness.sentence.endswith(verdict) and "along the trajectories" in sharpness.sentence


def trained(optimizer: str, seed: int) -> str:
    """The training whose checkpoint probes of the fixture have measured."""
    runs = mlflow.search_runs(
        filter_string=f"tags.`lsa.step` = 'train' and tags.optimizer = '{optimizer}' "
        f"and tags.seed = '{seed}'",
        output_format="list",
    )
    return runs[0].info.run_id


def test_a_value_that_is_not_finite_does_not_stop_the_others(seven_seeds):
    run = measured(seven_seeds)
    victim = next(m for m in run if m.step == "lanczos" and m.subject == "sgd" and m.seed == 3)
    tag = "lsa.not_finite.lanczos/lambda_max"
    mlflow.MlflowClient().set_tag(victim.done.run_id, tag, "inf")
    found = {f.metric: f for f in findings(measured(seven_seeds))}
    assert "sgd has the value inf at seed 3" in found["lanczos/lambda_max"].sentence
    assert "final/val_accuracy" in found


def test_a_barrier_counts_only_beyond_its_error():
    numbers = {"interpolation/barrier": 1.0, "interpolation/alpha_min": 0.5}
    wide = {"interpolation/barrier_se_data": 0.6}
    narrow = {"interpolation/barrier_se_data": 0.4}
    pairs = {"a – b": narrow, "a – c": wide}
    runs = [
        Measurement("interpolation", pair, seed, Done("", numbers | errors, {}, {}))
        for pair, errors in pairs.items()
        for seed in range(8)
    ]
    found = {(f.metric, f.level.subject): f.level for f in pair_findings(runs)}
    assert found["interpolation/barrier", "a – b"].established
    assert found["interpolation/barrier", "a – c"].beyond == 0
    assert found["interpolation/alpha_min", "a – b"].verdict == ""
    assert found["interpolation/alpha_min", "a – b"].mean == 0.5


def test_the_newest_measurement_of_a_checkpoint_counts(seven_seeds):
    for seed in range(7):
        equal = {"lanczos/lambda_max": 5.0 + seed}
        log("lanczos", "sgd", seed, equal, k=2, checkpoint=trained("sgd", seed))
    found = {f.metric: f.comparison for f in findings(measured(seven_seeds))}
    assert found["lanczos/lambda_max"].effect == pytest.approx(1)


def test_what_was_measured_with_other_options_by_hand_does_not_count(seven_seeds):
    other = {"lanczos/lambda_max": 1000.0}
    log("lanczos", "sgd", 0, other, k=5, checkpoint=trained("sgd", 0))
    found = {f.metric: f.comparison for f in findings(measured(seven_seeds))}
    assert found["lanczos/lambda_max"].effect == pytest.approx(2)


def test_measurements_with_other_options_are_not_compared(seven_seeds):
    for optimizer, k in (("sgd", 5), ("adamw", 2)):  # a probe that the project does not list
        ratio = {"sgd_noise/noise_ratio": 1.0}
        log("sgd_noise", optimizer, 0, ratio, k=k, checkpoint=trained(optimizer, 0))
    with pytest.raises(InputError, match="sgd_noise was measured with k=5 and with k=2"):
        findings(measured(seven_seeds))


def test_nothing_measured_is_said(workplace, capsys):
    assert app.run(["compare", "tiny"]) == 2
    assert "nothing of project tiny is measured" in capsys.readouterr().err


def edited(old: str, new: str) -> None:
    """Change the project's file."""
    file = Path("projects/tiny.yaml")
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("hidden: [16]", "hidden: [4]"),
        ("train_limit: 200", "train_limit: 100"),
        ("batch_size: 50}", "batch_size: 50, clip_norm: 0.1}"),
        ("batch_size: 50}", "batch_size: 50, schedule: {name: constant, warmup_epochs: 1}}"),
        ("lr: 0.1}", "lr: 0.1, momentum: 0.9}"),
    ],
)
def test_a_training_of_another_state_of_the_file_does_not_count(trained, old, new):
    assert [m.step for m in measured(project.load("tiny"))] == ["train"]
    edited(old, new)
    with pytest.raises(InputError, match="as its file says now"):
        measured(project.load("tiny"))


def test_what_changes_no_training_does_not_matter(trained):
    edited("batch_size: 50}", "batch_size: 50, checkpoint_every: 1, noise_scale: false}")
    assert [m.step for m in measured(project.load("tiny"))] == ["train"]


def test_an_option_that_the_file_has_no_more_is_another_optimizer(seven_seeds):
    options = {"optimizer.name": "SGD", "optimizer.lr": 0.1}
    log("train", "sgd", 0, {"final/train_loss": 0.5}, **options)
    log("train", "sgd", 0, {"final/train_loss": 0.7}, **options, **{"optimizer.momentum": 0.9})
    (counts,) = (
        m for m in measured(seven_seeds) if (m.step, m.subject, m.seed) == ("train", "sgd", 0)
    )
    assert counts.numbers == {"final/train_loss": 0.5}


def test_a_measurement_by_hand_with_other_samples_or_random_numbers_does_not_count(trained, capsys):
    assert app.run(["lanczos", "--project", "tiny", "--optimizer", "sgd"]) == 0
    own = [m.done.run_id for m in measured(project.load("tiny"))]
    for given in (["--samples", "32"], ["--rng-seed", "7"]):
        assert app.run(["lanczos", "--project", "tiny", "--optimizer", "sgd", *given]) == 0
        assert [m.done.run_id for m in measured(project.load("tiny"))] == own
